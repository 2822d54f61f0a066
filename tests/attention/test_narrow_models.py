"""LRSA over keys and values from latents of low rank: one rule in training, prefill and decoding.

``pytest tests/attention tests/conformance --low-rank joint`` holds such models to all other tests of the attention.
"""

import pytest
import torch
from helpers import narrowed
from torch.nn.functional import cross_entropy

from lrsa_lit.attention import LRSACache, enable, using
from lrsa_lit.attention.low_rank_linear import LowRankLinear

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Olmo2", "SmolLM3"]


@pytest.fixture(scope="module", params=["joint", "head"])
def grouping(request):
    return request.param


@torch.no_grad()
def feed(model, cache, ids, sizes):
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_gives_the_parallel_pass(family, grouping, whole, tokens, rule):
    model, ids = enable(narrowed(whole(family), grouping), rule), tokens(2, 90)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    expected = model(ids, use_cache=False).logits
    for sizes in ([90], [1, 17, 1, 40, 31], [60] + [1] * 30):
        found = feed(model, LRSACache(rule, 3), ids, sizes)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_keeps_what_the_whole_model_keeps_and_half_does_not(family, grouping, whole, tokens, rule):
    ids = tokens(2, 90)
    expected, full, half = (
        enable(model, rule)(ids, use_cache=False).logits
        for model in (whole(family), narrowed(whole(family), grouping, 1.0), narrowed(whole(family), grouping, 0.5))
    )
    torch.testing.assert_close(full, expected, rtol=0, atol=1e-4)
    assert (half - expected).abs().max() > 1e-2


def test_dense_layers_and_other_rules_are_those_of_the_model(grouping, whole, tokens, rule):
    model, ids = enable(narrowed(whole("Llama"), grouping), rule), tokens(1, 90)
    for other in (rule.replace(dense_layers=(0, 2)), rule.replace(top_k=8), rule.replace(top_k=0)):
        with using(model, other):
            found = feed(model, LRSACache(other, 3), ids, [50, 1, 39])
            torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def test_factors_get_the_gradient_of_finite_differences(grouping, whole, tokens, rule):
    model, ids = enable(narrowed(whole("Llama"), grouping), rule), tokens(1, 60)
    layer = model.model.layers[1].self_attn

    def loss():
        # Transformers' own loss is float32, too coarse for the steps below.
        return cross_entropy(model(ids, use_cache=False).logits[0, :-1].double(), ids[0, 1:])

    loss().backward()
    for factor in (layer.k_proj.down, layer.k_proj.up[0], layer.v_proj.down, layer.v_proj.up[0]):
        place = factor.weight.grad.abs().argmax()
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                factor.weight.view(-1)[place] += step
                values.append(loss().item())
                factor.weight.view(-1)[place] -= step
        expected = (values[0] - values[1]) / 2e-3
        assert factor.weight.grad.view(-1)[place].item() == pytest.approx(expected, rel=1e-2)
