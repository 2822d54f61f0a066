"""K that differs by layer and head, in a model: training, caches, decoding, what is refused."""

import json
from fractions import Fraction

import pytest
import torch
from helpers import refused

from lrsa_lit.analysis.capture import capture
from lrsa_lit.attention import LRSACache, LRSAConfig, enable, observing, prefill
from lrsa_lit.attention.budgets import mean_top_k
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.ops.sparse_attention import MeanPool, QueryAttention, RandomTokens, TokenGate, stored_size
from lrsa_lit.systems import KeyNorm

BUDGETS = [[0, 8], [3, 5], [8, 3]]
"""Of three layers with two heads, L = 8."""


@pytest.fixture
def ragged(rule):
    return rule.replace(head_top_k=BUDGETS)


def test_equal_budgets_are_the_rule_itself(tiny, tokens, rule):
    model, ids = tiny("Llama"), tokens(2, 60)
    for budgets, same in (
        ([[3, 3], 3, None], rule),
        ([0, 0, 0], rule.replace(top_k=0)),
        ([3, [8, 8], 3], rule.replace(dense_layers=(1,))),
    ):
        config = rule.replace(head_top_k=budgets)
        assert [config.layers.of(layer) for layer in range(3)] == [same.layers.of(layer) for layer in range(3)]
        with torch.no_grad():
            logits = [enable(model, each)(ids, use_cache=False).logits for each in (config, same)]
        assert logits[0].equal(logits[1])


def test_dense_layers_win(rule):
    layers = rule.replace(head_top_k=BUDGETS, dense_layers=(0,)).layers
    assert layers.of(0) is None
    assert layers.of(1).top_k == (3, 5)


SPLITS = {"at-once": [90], "odd": [1, 17, 1, 40, 31], "decode": [60] + [1] * 30}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("dense", [(), (1,)], ids=["sparse", "dense"])
def test_any_split_gives_the_parallel_pass(sizes, dense, tiny, tokens, ragged):
    config, ids = ragged.replace(dense_layers=dense), tokens(2, 90)
    model, start, parts = enable(tiny("Llama"), config), 0, []
    cache = LRSACache.of(model)
    with torch.no_grad():
        for size in sizes:
            parts.append(model(ids[:, start : start + size], past_key_values=cache).logits)
            start += size
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    stored = [sum(stored_size(90, config.rule.replace(top_k=top_k)) for top_k in layer) for layer in BUDGETS]
    assert cache.stored_tokens() == [2 * 90 if layer in dense else count for layer, count in enumerate(stored)]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"chunk_size": 5},
        {"compressor": QueryAttention(window=3)},
        {"compressor": RandomTokens()},
        {"compressor": TokenGate()},
    ],
    ids=["rule", "chunk", "queries", "random", "gates"],
)
def test_padded_rows_are_decoded_as_each_alone(change, tiny, tokens, ragged):
    model = enable(tiny("Llama"), ragged.replace(**change))
    ids, more, mask = tokens(2, 40), tokens(2, 45, seed=1), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    cache = LRSACache.of(model)
    prefill(model, ids, cache, attention_mask=mask)
    decoder = Decoder(model, cache)
    logits = torch.cat([decoder.step(more[:, at, None]).clone() for at in range(45)], dim=1)
    for row, start in enumerate((0, 13)):
        alone = torch.cat([ids[row, start:], more[row]])[None]
        with torch.no_grad():
            whole = model(alone, use_cache=False).logits[:, -45:]
        torch.testing.assert_close(logits[row, None], whole, rtol=0, atol=1e-5)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].stored_tokens() == sum(stored_size(72, ragged.rule.replace(top_k=k)) for k in BUDGETS[0])


def test_training_gives_each_head_its_gradient(tiny, tokens, rule):
    """With one K for all, cut into groups or not, the gradients are the same; with others they are finite."""
    model, ids, grads = tiny("Llama").train(), tokens(2, 60), []
    for budgets in (None, [[3, 3]] * 3, BUDGETS):
        enable(model, rule.replace(head_top_k=budgets))
        model.zero_grad()
        model(ids, use_cache=False).logits.square().mean().backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    assert all(map(torch.equal, *grads[:2]))
    assert all(grad.isfinite().all() for grad in grads[2])
    assert not all(map(torch.equal, grads[0], grads[2]))


def test_an_observer_sees_the_rules_of_heads(tiny, tokens, ragged):
    seen = []
    model = enable(tiny("Llama"), ragged)
    with observing(model, lambda attached, *_: seen.append(attached.rule.top_k)), torch.no_grad():
        model(tokens(1, 40), use_cache=False)
    assert seen == [(0, 8), (3, 5), (8, 3)]
    with refused("head_top_k", reason="a single K"), capture(model):
        pass


def test_a_file_holds_them(tmp_path, rule):
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(BUDGETS))
    config = rule.replace(head_top_k=str(path))
    assert config == rule.replace(head_top_k=BUDGETS)
    assert config == LRSAConfig.from_dict(config.to_dict())
    assert config.to_dict()["head_top_k"] == BUDGETS
    assert config.replace(top_k=5) == rule.replace(top_k=5), "another K is one for all heads"
    path.write_text("[[1,")
    with refused("head_top_k", str(path), reason="is not valid JSON"):
        rule.replace(head_top_k=str(path))
    with refused("head_top_k", str(tmp_path / "none"), reason="cannot be read"):
        rule.replace(head_top_k=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        ([], "head_top_k", ""),
        (3, "head_top_k", ""),
        ([[1, 2], [3]], "head_top_k", "has lists of [1, 2] heads"),
        ([[], []], "head_top_k", "has lists of [0] heads"),
        ([3, [3, 9]], "head_top_k.1.1", ""),
        ([3, -1], "head_top_k.1", ""),
        ([[[1]]], "head_top_k.0.0", ""),
        ([0.5], "head_top_k.0", ""),
    ],
    ids=str,
)
def test_other_lists_are_refused(value, field, reason, rule):
    with refused(field, reason=reason):
        rule.replace(head_top_k=value)


def test_what_does_not_go_with_them_is_refused(tiny, rule, ragged):
    model = tiny("Llama")
    with refused("head_top_k", reason="has K of 2 layers; the model has 3 layers x 2 heads"):
        enable(model, rule.replace(head_top_k=[1, 2]))
    with refused("head_top_k", reason="has K of 3 layers x 3 heads; the model has 3 layers x 2 heads"):
        enable(model, rule.replace(head_top_k=[[1, 2, 3]] * 3))
    with refused("head_top_k", reason="has K of 3 layers"):
        LRSACache(ragged, 4)
    with refused("head_top_k", reason="with a system"):
        ragged.replace(system=KeyNorm())
    with refused("compressor.shared_heads", True):
        ragged.replace(compressor=QueryAttention(window=2, shared_heads=True))
    with refused("config.head_top_k"):
        LRSACache.of(model, ragged)


def test_the_mean_is_over_heads_and_layers(rule, ragged):
    assert mean_top_k(rule, 3) == 3
    assert mean_top_k(ragged, 3) == Fraction(0 + 8 + 3 + 5 + 8 + 3, 6)
    assert mean_top_k(ragged.replace(dense_layers=(0,)).to_dict(), 3) == Fraction(16 + 3 + 5 + 8 + 3, 6)
    assert mean_top_k(rule.replace(head_top_k=[1, [3, 5], 8], compressor=MeanPool()), 3) == Fraction(13, 3)
