"""Gates that are fitted to KVzip's scores: against explicit least squares, and what they find."""

import pytest
import torch
from helpers import refused

from lrsa_lit.analysis import gate_fit
from lrsa_lit.analysis.gate_fit import LEAST, RIDGE, fit_token_gates
from lrsa_lit.attention import LRSAConfig, enable, enabled_config
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import Rule

RULE = Rule(3, 8, 3)


def encode(text):
    return [10 + ord(letter) % 26 for letter in text][:3]


def contexts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def model():
    return tiny_model(hidden_size=16, num_heads=4, num_kv_heads=2).double()


@pytest.fixture
def judged(monkeypatch):
    """What each context was in each layer."""
    found, own = [], gate_fit._judge
    monkeypatch.setattr(gate_fit, "_judge", lambda *args: found.append(own(*args)) or found[-1])
    return found


def partitions(rows, count):
    """Of each partition, its rows less their mean, one by one."""
    for p in range(count):
        part = rows[3 + 8 * p : 11 + 8 * p].double()
        yield part - part.mean(dim=0)


def best(scores, p):
    """The three tokens of a partition with the highest of the scores (T,)."""
    tokens = range(3 + 8 * p, 11 + 8 * p)
    return set(sorted(tokens, key=lambda token: (-float(scores[token]), token))[:3])


def test_gates_are_the_least_squares_of_what_kvzip_scores(model, judged):
    given = contexts(40, 12, 61, 33)
    fitted = fit_token_gates(model, given, RULE, encode=encode)
    assert (fitted.fitted_on, fitted.held_out) == (2, 1), "the second is too short, the last is held out"
    assert fitted.gates.shape == (2, 2, 16)
    for layer, gates in enumerate(fitted.gates):
        states, targets = [], []
        for context, count in zip(judged[:2], (4, 7), strict=True):
            states += partitions(context[layer].hidden, count)
            targets += partitions(context[layer].scores.T.double().clamp(min=LEAST).log(), count)
        states, targets = torch.cat(states), torch.cat(targets)
        ridge = (RIDGE * states.square().sum(dim=0).mean()).sqrt() * torch.eye(16, dtype=torch.float64)
        wide = torch.cat([states, ridge]), torch.cat([targets, torch.zeros(16, 2, dtype=torch.float64)])
        torch.testing.assert_close(gates.double(), torch.linalg.lstsq(*wide).solution.T, rtol=1e-4, atol=1e-4)
    kept = []
    for layer, gates in enumerate(fitted.gates):
        hidden, scores, *_ = judged[2][layer]
        for head in range(2):
            for p in range(2):
                kept.append(len(best(scores[head], p) & best(hidden @ gates[head].double(), p)) / 3)
    assert fitted.found == pytest.approx(sum(kept) / len(kept))
    assert fitted.chance == 3 / 8
    assert 0 <= fitted.lag_relative <= 1


def test_scores_that_a_gate_can_have_are_found(model, monkeypatch):
    own, wanted = gate_fit._judge, torch.randn(2, 2, 16, dtype=torch.float64)

    def judge(*args):
        layers = own(*args)
        return [
            layer._replace(scores=(layer.hidden @ gate.T / 4).exp().T)
            for layer, gate in zip(layers, wanted, strict=True)
        ]

    monkeypatch.setattr(gate_fit, "_judge", judge)
    monkeypatch.setattr(gate_fit, "RIDGE", 1e-12)
    fitted = fit_token_gates(model, contexts(*[80] * 11), RULE, encode=encode)
    assert (fitted.fitted_on, fitted.held_out, fitted.found) == (10, 1, 1.0)
    # The normalised states of a layer lie in a subspace, in which alone gates are determined.
    (layer, *_) = own(enable(model, LRSAConfig(system=gate_fit.KVzip(pairs=3, sink_size=3))), contexts(60)[0], encode)
    centred = layer.hidden - layer.hidden.mean(dim=0)
    torch.testing.assert_close(centred @ fitted.gates[0].double().T, centred @ wanted[0].T / 4, rtol=1e-3, atol=1e-3)


def test_the_model_and_its_rule_stay_as_they_are(model):
    enable(model, LRSAConfig(3, 8, 3))
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fit_token_gates(model, contexts(40, 40), RULE, encode=encode)
    assert model.training
    assert enabled_config(model) == LRSAConfig(3, 8, 3)
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.model.layers.modules())


def test_what_no_gate_can_be_fitted_to_is_refused(model):
    with refused("top_k", 0, "at least 1"):
        fit_token_gates(model, contexts(40, 40), RULE.replace(top_k=0), encode=encode)
    with refused("contexts", "1 of 3", "at least two of 20 tokens"):
        fit_token_gates(model, contexts(19, 20, 5), RULE, encode=encode)
