"""Spectra against the recorded vectors, their gradients, what is kept of them, and the factors that are left."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lrsa_lit.models import factors
from lrsa_lit.models.spectral_budget import SpectralBudget
from lrsa_lit.models.spectrum import (
    SpectrumLinear,
    counted,
    cut,
    pruned,
    ratio_of,
    spectra_of,
    undecided,
    whole_again,
    without_scores,
)
from lrsa_lit.models.tiny import tiny_config, tiny_model
from lrsa_lit.objectives.distillation import divergence
from lrsa_lit.objectives.distribution import Distribution

pytestmark = pytest.mark.whole

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/systems/soco.json").read_text(encoding="utf-8"))
IDS = torch.arange(1, 46)[None] * 7 % 259


def recorded(name):
    return torch.tensor(VECTORS[name], dtype=torch.float64)


def layer(weight, bias=None, blocks=1):
    linear = nn.Linear(*reversed(weight.shape), bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return SpectrumLinear(linear, blocks)


@pytest.fixture
def of_vectors():
    made = layer(recorded("W"))
    with torch.no_grad():
        made.logits.copy_(recorded("a")[None])
    return made


def close(found, wanted, error=1e-9):
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=error)


def weight_of(made):
    """The matrix that a layer multiplies with."""
    inputs = torch.eye(made.in_features, dtype=made.left.dtype)
    return made(inputs).T - made(torch.zeros_like(inputs)).T


def test_scores_scale_the_recorded_matrix(of_vectors):
    close(of_vectors.sigma[0], recorded("sigma"))
    close(of_vectors.scores[0], recorded("scores"))
    close(weight_of(of_vectors), recorded("W_scaled"))
    close(weight_of(layer(recorded("W"))), recorded("W"), 1e-14)


def test_what_is_kept_is_not_what_is_largest(of_vectors):
    threshold = VECTORS["threshold"]
    kept = pruned([of_vectors.scores], [0], threshold, 4)
    assert kept[0][0].nonzero().flatten().tolist() == VECTORS["kept"]
    cut([of_vectors], kept)
    close(weight_of(of_vectors), recorded("W_pruned"))
    with torch.no_grad():
        of_vectors.deviation.copy_(recorded("deviation"))
    close(of_vectors(recorded("x")), recorded("y_pruned"))
    plain = layer(recorded("W"))
    cut([plain], [torch.tensor([[True, True, False, False]])])
    close(weight_of(plain), recorded("W_plain_rank_2"))


def test_counts_are_the_recorded_ones(of_vectors):
    counts = counted(of_vectors.scores, VECTORS["threshold"], VECTORS["temperature"])
    outputs, inputs = recorded("W").shape
    share = {"whole": outputs * inputs, "cost": outputs + inputs}
    close(counts[0], recorded("p"))
    close(ratio_of([counts], **share), recorded("soft_ratio"))
    close(undecided([counts]), recorded("binarity"))
    (kept,) = pruned([of_vectors.scores], [0], VECTORS["threshold"], 4)
    close(ratio_of([kept.double()], **share), recorded("hard_ratio"))


def test_the_divergence_is_the_projects_own():
    teacher, student = (torch.tensor(VECTORS["kl"][f"{name}_logits"]).double() for name in ("teacher", "student"))
    close(divergence(student, Distribution.of(teacher)) / len(teacher), torch.tensor(VECTORS["kl"]["mean_kl"]).double())


def test_the_recorded_budget_is_shared_by_layers():
    of = VECTORS["budget_prune"]
    scores = [torch.tensor([of[f"scores_layer_{number}"]]) for number in (0, 1)]
    kept = pruned(scores, [0, 1], of["threshold"], of["most_components"])
    for number, mask in enumerate(kept):
        assert mask[0].nonzero().flatten().tolist() == of[f"kept_layer_{number}"]


def plain_pruned(scores, layers, threshold, most):
    """One component after the other, as the definition has it."""
    kept = {(m, g, r) for m, each in enumerate(scores) for g, row in enumerate(each) for r, s in enumerate(row)
            if s > threshold or r == max(range(len(row)), key=lambda i, row=row: (row[i], -i))}  # fmt: skip
    first = {(m, g, max(range(len(row)), key=lambda i, row=row: (row[i], -i)))
             for m, each in enumerate(scores) for g, row in enumerate(each)}  # fmt: skip
    while len(kept) > most and kept - first:
        kept.remove(
            min(kept - first, key=lambda at: (scores[at[0]][at[1]][at[2]], -layers[at[0]], -at[2], -at[0], -at[1]))
        )
    return kept


@given(st.data())
def test_pruning_is_that_of_one_by_one(data):
    blocks, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    one = st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.5, 1.0, 1.3])
    matrix = st.lists(st.lists(one, min_size=width, max_size=width), min_size=blocks, max_size=blocks)
    scores = data.draw(st.lists(matrix, min_size=1, max_size=4))
    layers = sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(scores), max_size=len(scores))))
    most = data.draw(st.integers(blocks * len(scores), blocks * len(scores) * width))
    found = pruned([torch.tensor(each, dtype=torch.float64) for each in scores], layers, 0.05, most)
    kept = {(number, *place) for number, each in enumerate(found) for place in each.nonzero().tolist()}
    assert kept == plain_pruned(scores, layers, 0.05, most)
    assert len(kept) <= most
    assert all(each.any(dim=1).all() for each in found), "each block keeps one"


SHAPES = {"wide": (6, 10, 1), "tall": (12, 5, 1), "heads": (12, 10, 3), "one head each": (4, 7, 4)}


@pytest.mark.parametrize(("outputs", "inputs", "blocks"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_the_matrix_in_float64(outputs, inputs, blocks, biased):
    generator = torch.Generator().manual_seed(outputs)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, bias, x = drawn(outputs, inputs), drawn(outputs) if biased else None, drawn(2, 3, inputs)
    made = layer(weight, bias, blocks)
    logits = drawn(*made.logits.shape).requires_grad_()
    deviation = drawn(outputs).requires_grad_()
    with torch.no_grad():
        made.logits.copy_(logits)
        made.deviation.copy_(deviation)
    made.requires_grad_(False)
    made.logits.requires_grad_(True)
    made.deviation.requires_grad_(True)

    def plain(logits, deviation):
        parts = []
        for block, scores in zip(weight.chunk(blocks), 2 / (1 + torch.exp(-logits)), strict=True):
            left, sigma, right = torch.linalg.svd(block, full_matrices=False)
            parts.append(left @ torch.diag(sigma * scores) @ right)
        return x @ torch.cat(parts).T + deviation + (0 if bias is None else bias)

    wanted, found = plain(logits, deviation), made(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    way = drawn(*found.shape)
    gradients = torch.autograd.grad((found * way).sum(), (made.logits, made.deviation))
    for one, other in zip(gradients, torch.autograd.grad((wanted * way).sum(), (logits, deviation)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(plain, (logits, deviation))
    narrow = copy.deepcopy(made).float()
    (narrow(x.float()) * way).sum().backward()
    error = (narrow.logits.grad - gradients[0]).norm() / gradients[0].norm()
    assert error < 1e-5


def test_scores_are_exact_where_weights_are_not():
    made = layer(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert {made.left.dtype, made.right.dtype} == {torch.bfloat16}
    assert {made.logits.dtype, made.deviation.dtype, made.sigma.dtype} == {torch.float32}
    assert made(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def qwen():
    """With biases of keys and values, and three key-value heads."""
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    config = Qwen2Config(vocab_size=259, initializer_range=0.2, **sizes, **heads)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


MODELS = {"llama": tiny_model, "qwen": qwen}
BUDGETS = {
    "joint": SpectralBudget(0.5),
    "heads": SpectralBudget(0.37, grouping="head"),
    "dense layer": SpectralBudget(0.25, threshold=0.4, dense_layers=(1,)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_at_first_a_model_is_what_it_was(make, budget):
    dense = make()
    model = copy.deepcopy(dense)
    budget.install(model)
    assert len(spectra_of(model)) == 2 * (dense.config.num_hidden_layers - len(budget.dense_layers))
    wanted = logits(dense)
    # Rounding: the same in float64.
    assert (logits(model) - wanted).norm() < 1e-5 * wanted.norm()
    torch.testing.assert_close(logits(model.double()), logits(dense.double()), rtol=0, atol=1e-4)


def trained(budget, make=tiny_model):
    """A model with spectra as a training might leave them."""
    model = make()
    budget.install(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in spectra_of(model).values():
            each.logits.copy_(torch.randn(each.logits.shape, generator=generator) * 2 - 1)
            each.deviation.copy_(torch.randn(each.deviation.shape, generator=generator) * 0.1)
    return model


def test_the_untouched_model_is_at_hand():
    model, dense = trained(BUDGETS["joint"]), logits(tiny_model())
    layers = spectra_of(model).values()
    before = logits(model)
    assert (before - dense).norm() > 0.05 * dense.norm()
    cut(layers, [torch.zeros_like(each.logits, dtype=torch.bool) for each in layers])
    with without_scores(model):
        assert (logits(model) - dense).norm() < 1e-5 * dense.norm()
    assert not torch.equal(logits(model), before)
    whole_again(layers)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_folded_factors_compute_what_was_kept(make, budget):
    model = trained(budget, make)
    spectra = spectra_of(model)
    whole = sum(each.out_features for each in spectra.values())
    kept = budget.kept({name: each.scores for name, each in spectra.items()}, whole)
    cut(spectra.values(), kept)
    weights = budget.folded(model.state_dict())
    narrow = make()
    factors.install(narrow, factors.factors_in(weights))
    narrow.load_state_dict(weights)
    wanted = logits(model)
    assert (logits(narrow) - wanted).norm() < 1e-5 * wanted.norm()

    # What a cache holds of a token: the outputs of the first factors.
    held = []
    for name, module in narrow.named_modules():
        if name.endswith(".down"):
            module.register_forward_hook(lambda _, __, latent: held.append(latent[0, 0].numel()))
    logits(narrow)
    config = narrow.config
    dense = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert sum(held) <= int(budget.ratio * dense * (config.num_hidden_layers - len(budget.dense_layers)) + 0.5)
    assert sum(held) == sum(int(mask.sum()) for mask in kept)
    above = sum(int((each.scores > budget.threshold).sum()) for each in spectra.values())
    if above >= int(budget.ratio * whole + 0.5):
        assert sum(held) == int(budget.ratio * whole + 0.5), "the budget is used up"


def test_bad_budgets_are_refused():
    for ratio in (0.0, -0.5, 1.1, float("nan")):
        with refused("ratio"):
            SpectralBudget(ratio)
    with refused("threshold", 1.0):
        SpectralBudget(0.5, threshold=1.0)
    with refused("grouping", "heads"):
        SpectralBudget(0.5, grouping="heads")
    with refused("ratio", 0.01, allowed="at least 0.0312"):
        SpectralBudget(0.01).check(tiny_config())
    with refused("ratio", 0.05, allowed="at least 0.0625"):
        SpectralBudget(0.05, grouping="head").check(tiny_config())


def test_models_that_share_keys_and_values_are_refused():
    shared, latent, outside = (tiny_config() for _ in range(3))
    shared.num_kv_shared_layers, latent.kv_lora_rank = 2, 16
    for config in (shared, latent):
        with refused("spectra", "llama"):
            SpectralBudget(0.5).check(config)
    with refused("dense_layers", [2], "from 0 to 1"):
        SpectralBudget(0.5, dense_layers=(2,)).check(outside)
