"""LRSA over keys and values of spectra, cut or not: one rule in training and decoding, with every compressor."""

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSACache, enable
from lrsa_lit.attention.low_rank_linear import LowRankLinear
from lrsa_lit.models import factors
from lrsa_lit.models.spectral_budget import SpectralBudget
from lrsa_lit.models.spectrum import cut, spectra_of, without_scores
from lrsa_lit.ops.sparse_attention import SharedHeads, stored_size
from lrsa_lit.plugins import registered

BUDGET = SpectralBudget(0.4, threshold=0.4)
ARGUMENTS = {"QueryAttention": {"window": 3, "kernel": 3}, "QueryRuns": {"window": 2, "size": 3},
             "StraightThrough": {"of": {"class_path": "RandomTokens"}, "by": "LagRelative"}}  # fmt: skip
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Olmo2", "SmolLM3"]


def with_spectra(model, budget=BUDGET):
    budget.install(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in spectra_of(model).values():
            layer.logits.copy_(torch.randn(layer.logits.shape, generator=generator) - 0.5)
            layer.deviation.copy_(torch.randn(layer.deviation.shape, generator=generator) * 0.1)
    return model


def cut_to(budget, model):
    spectra = spectra_of(model)
    whole = sum(layer.out_features for layer in spectra.values())
    cut(spectra.values(), budget.kept({name: layer.scores for name, layer in spectra.items()}, whole))
    return model


def folded(budget, model, narrow):
    weights = budget.folded(model.state_dict())
    factors.install(narrow, factors.factors_in(weights))
    narrow.load_state_dict(weights)
    return narrow


@torch.no_grad()
def decoded(model, ids):
    cache = LRSACache.of(model)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([47, 1, 42], dim=1)], dim=1)


def compressors():
    found = registered("compressors")
    # Its gates are a file's, made for a model.
    return sorted(found.keys() - {"TokenGate"})


@pytest.mark.parametrize("name", compressors())
def test_every_compressor_keeps_the_same_in_training_and_decoding(name, whole, tokens, rule):
    made = {"compressor": {"class_path": name, "init_args": ARGUMENTS.get(name, {})}}
    rule = type(rule).from_dict({**rule.to_dict(), **made})
    model, ids = enable(with_spectra(whole("Llama")), rule), tokens(2, 90)
    model.requires_grad_(False)
    for layer in spectra_of(model).values():
        layer.logits.requires_grad_(True)
    loss = model(ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(loss, [layer.logits for layer in spectra_of(model).values()])
    assert all(each.isfinite().all() and each.any() for each in gradients)
    cut_to(BUDGET, model)
    with torch.no_grad():
        parallel = model(ids, use_cache=False).logits
    torch.testing.assert_close(decoded(model, ids), parallel, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grouping", ["joint", "head"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_factors_are_attended_to_as_what_was_kept(family, grouping, whole, tokens, rule):
    budget = SpectralBudget(0.4, 0.4, grouping, (1,))
    rule, ids = rule.replace(dense_layers=(2,)), tokens(2, 90)
    model = enable(cut_to(budget, with_spectra(whole(family), budget)), rule)
    wanted = model(ids, use_cache=False).logits
    narrow = enable(folded(budget, model, whole(family)), rule)
    torch.testing.assert_close(narrow(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded(narrow, ids), wanted, rtol=0, atol=1e-4)
    dense = enable(whole(family), rule)(ids, use_cache=False).logits
    assert (wanted - dense).abs().max() > 1e-2
    with without_scores(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@torch.no_grad()
def test_a_cache_of_latents_holds_what_the_ratio_says(ratio, whole, tokens, rule):
    """Layers, keys and values differ in their ranks."""
    budget, ids = SpectralBudget(ratio, 0.2), tokens(1, 90)
    narrow = folded(budget, cut_to(budget, with_spectra(whole("Llama"), budget)), whole("Llama"))
    ranks = [layer.ranks[0] for layer in narrow.modules() if isinstance(layer, LowRankLinear)]
    assert len(set(ranks)) > 1
    config = narrow.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    assert sum(ranks) == int(ratio * 2 * width * config.num_hidden_layers + 0.5)
    enable(narrow, rule.replace(compressor=SharedHeads(), latents=True))
    cache = LRSACache.of(narrow)
    found = narrow(ids, past_key_values=cache).logits
    torch.testing.assert_close(found, narrow(ids, use_cache=False).logits, rtol=0, atol=1e-5)
    # A position is 4 bytes, a number 8.
    assert cache.nbytes == stored_size(90, rule.rule) * (8 * sum(ranks) + 4 * config.num_hidden_layers)


def test_heads_of_different_ranks_are_refused_a_cache_of_latents(whole, rule):
    budget = SpectralBudget(0.5, 0.2, "head")
    narrow = folded(budget, cut_to(budget, with_spectra(whole("Llama"), budget)), whole("Llama"))
    with refused("latents", "LlamaAttention", reason="has heads with latents of different ranks"):
        enable(narrow, rule.replace(latents=True))
