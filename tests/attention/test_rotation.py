"""The rotation read from a model is the one that its keys have."""

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSACache, cache_argument, enable, observing, rotaries_of
from lrsa_lit.ops.sparse_attention import FreqPartition, Rotary

KINDS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    },
}  # fmt: skip
FAMILIES = ["Qwen3", "GPTNeoX", "Phi3", "SmolLM3", "Olmo2"]


@pytest.mark.parametrize("case", [*KINDS, *FAMILIES])
@torch.no_grad()
def test_unrotated_keys_do_not_depend_on_their_place(case, tiny, rule):
    """One token over and over: the keys of a first layer differ in nothing but their rotation."""
    model = tiny("Llama", rope_parameters=KINDS[case]) if case in KINDS else tiny(case)
    seen = []
    with observing(enable(model, rule), lambda attached, layout, query, key, value: seen.append(key)):
        model(torch.full((1, 90), 7), use_cache=False)
    rotaries = rotaries_of(model)
    assert len(rotaries) == len(seen) == 3
    key, positions = seen[0].float(), torch.arange(90)
    raw = rotaries[0].unrotate(key, positions)
    torch.testing.assert_close(raw, raw[:, :, :1].expand_as(raw), rtol=0, atol=1e-4)
    torch.testing.assert_close(rotaries[0].rotate(raw, positions), key, rtol=0, atol=1e-4)
    if case != "SmolLM3":
        assert not torch.allclose(key, key[:, :, :1], atol=0.1)


def test_layers_without_positions_rotate_nothing(tiny):
    first, second, third = rotaries_of(tiny("SmolLM3"))
    assert first == third == Rotary(())
    assert len(second.frequencies) == 4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind, tiny):
    parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with refused("rope_type", kind, "one of default, linear, llama3, yarn", reason="depends on the length"):
        rotaries_of(tiny("Llama", rope_parameters=parameters))


@pytest.mark.parametrize(("family", "reason"), [("GPT2", "no rotary positions"), ("Glm", "rotates other pairs")])
def test_other_positions_are_refused(family, reason, tiny):
    changes = {"head_dim": 8} if family == "Glm" else {}
    with refused("model", f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}", reason=reason):
        rotaries_of(tiny(family, "LMHeadModel" if family == "GPT2" else "ForCausalLM", **changes))


@torch.no_grad()
@pytest.mark.parametrize("family", ["Qwen2", "GPTNeoX", "SmolLM3"])
def test_partitions_in_the_frequency_domain_see_keys_without_their_rotation(family, tiny, tokens, rule):
    """With all frequencies kept it is dense, and with fewer a cache gives what the parallel pass gives."""
    model, ids, config = tiny(family), tokens(2, 90), rule.replace(compressor=FreqPartition())
    dense = model(ids, use_cache=False).logits
    enable(model, config.replace(top_k=config.lag_size))
    torch.testing.assert_close(model(ids, use_cache=False).logits, dense, rtol=0, atol=1e-5)
    sparse = enable(model, config)(ids, use_cache=False).logits
    assert not torch.allclose(sparse, dense, atol=1e-2)
    cache = LRSACache.of(model)
    parts = [model(part, **cache_argument(model, cache)).logits for part in ids.split([50, 1, 39], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), sparse, rtol=0, atol=1e-5)


def test_a_cache_without_a_model_has_no_rotation_to_take_off(tiny, rule):
    config = rule.replace(compressor=FreqPartition())
    with refused("compressor", "FreqPartition", reason="use LRSACache.of(model)"):
        LRSACache(config, 3)
    with refused("model", "GPT2LMHeadModel", reason="no rotary positions"):
        enable(tiny("GPT2", "LMHeadModel"), config)
