"""The rotation read from a model is the one that its keys have."""

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import enable, observing, rotaries_of
from lrsa_lit.ops.sparse_attention import Rotary

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


@pytest.mark.parametrize(("family", "reason"), [("GPT2", "no rotary positions"), ("Glm", "turns other channels")])
def test_other_positions_are_refused(family, reason, tiny):
    changes = {"head_dim": 8} if family == "Glm" else {}
    with refused("model", f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}", reason=reason):
        rotaries_of(tiny(family, "LMHeadModel" if family == "GPT2" else "ForCausalLM", **changes))
