"""LRSA over keys and values of spectra, cut or not: one rule in training and decoding, with every compressor."""

import pytest
import torch

from lrsa_lit.attention import LRSACache, enable
from lrsa_lit.models import factors
from lrsa_lit.models.spectral_budget import SpectralBudget
from lrsa_lit.models.spectrum import cut, spectra_of, without_scores
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


@torch.no_grad()
def decoded(model, ids):
    cache = LRSACache.of(model)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([47, 1, 42], dim=1)], dim=1)


def compressors():
    found = registered("compressors")
    # Its gates are a file's, made for a model.
    return sorted(found.keys() - {"TokenGate"})


@pytest.mark.parametrize("name", compressors())
def test_every_compressor_keeps_the_same_in_training_and_decoding(name, tiny, tokens, rule):
    made = {"compressor": {"class_path": name, "init_args": ARGUMENTS.get(name, {})}}
    rule = type(rule).from_dict({**rule.to_dict(), **made})
    model, ids = enable(with_spectra(tiny("Llama")), rule), tokens(2, 90)
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
def test_factors_are_attended_to_as_what_was_kept(family, grouping, tiny, tokens, rule):
    budget = SpectralBudget(0.4, 0.4, grouping, (1,))
    rule, ids = rule.replace(dense_layers=(2,)), tokens(2, 90)
    model = enable(cut_to(budget, with_spectra(tiny(family), budget)), rule)
    wanted = model(ids, use_cache=False).logits
    narrow = tiny(family)
    weights = budget.folded(model.state_dict())
    factors.install(narrow, factors.factors_in(weights))
    narrow.load_state_dict(weights)
    enable(narrow, rule)
    torch.testing.assert_close(narrow(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded(narrow, ids), wanted, rtol=0, atol=1e-4)
    dense = enable(tiny(family), rule)(ids, use_cache=False).logits
    assert (wanted - dense).abs().max() > 1e-2
    with without_scores(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, rtol=0, atol=1e-4)
