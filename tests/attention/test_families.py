"""Each supported family runs the rule, and each that cannot is refused with one line."""

import pytest
import torch
from helpers import refused
from torch import nn

from lrsa_lit.attention import LRSACache, disable, enable, enabled_config

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "GPTNeoX", "Phi3", "SmolLM3", "Olmo2", "Granite"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_models_own_attention_and_keeping_fewer_is_not(family, tiny, tokens, rule):
    model, ids = tiny(family), tokens(2, 90)
    dense = model(ids, use_cache=False).logits
    enable(model, rule.replace(top_k=rule.lag_size))
    torch.testing.assert_close(model(ids, use_cache=False).logits, dense, rtol=0, atol=1e-5)
    enable(model, rule)
    sparse = model(ids, use_cache=False).logits
    first = rule.rule.first_compression
    torch.testing.assert_close(sparse[:, :first], dense[:, :first], rtol=0, atol=1e-5)
    gap = (sparse - dense)[:, first:].abs().amax(dim=(0, 2))
    assert (gap > 1e-2).all(), "every later token must lose something"
    cached = model(ids, past_key_values=LRSACache(rule, 3)).logits
    torch.testing.assert_close(cached, sparse, rtol=0, atol=1e-5)
    disable(model)
    assert model(ids, use_cache=False).logits.equal(dense)


def test_the_layers_of_smollm3_differ_in_their_rotation(tiny):
    modules = [module for module in tiny("SmolLM3").modules() if hasattr(module, "use_rope")]
    assert [bool(module.use_rope) for module in modules] == [False, True, False]


BYPASS = "does not route all its 3 layers through transformers' attention interface"
WINDOW = "uses sliding-window or linear layers, which LRSA does not support"
BOTH_WAYS = "attends in both directions, as encoders do, which LRSA does not support"
CROSSING = "attends from one text to another (cross-attention), which LRSA does not support"
LATENT = "has keys and values of different sizes, or stores them compressed (MLA), which LRSA does not support"
FULL = ["full_attention"] * 3
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,
}
SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
REFUSED = {
    "sliding-window": ("Mistral", {"sliding_window": 16}, WINDOW),
    "some-layers-slide": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, WINDOW),
    "linear-layers": ("Qwen3Next", {}, WINDOW),
    "gemma2-windows": ("Gemma2", {}, WINDOW),
    "gemma2-softcap": (
        "Gemma2",
        {"layer_types": FULL, "sliding_window": None},
        "caps its attention scores (softcap)",
    ),
    "gpt-oss-windows": ("GptOss", {}, WINDOW),
    "gpt-oss-sinks": (
        "GptOss",
        {"layer_types": FULL, "sliding_window": None},
        "learns attention sinks (s_aux)",
    ),
    "bloom": ("Bloom", {"n_layer": 3, "n_head": 4, **SMALL}, BYPASS),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, **SMALL}, BYPASS),
    "bert": ("Bert", {}, BOTH_WAYS, "ForMaskedLM"),
    "modern-bert": ("ModernBert", {"layer_types": FULL, "local_attention": 128}, BOTH_WAYS, "ForMaskedLM"),
    "llama-for-embeddings": ("Llama", {"is_causal": False}, BOTH_WAYS),
    "bart": ("Bart", {"encoder_layers": 3, "decoder_layers": 3, "d_model": 32}, CROSSING, "ForConditionalGeneration"),
    "gpt2-that-reads-an-encoder": ("GPT2", {"add_cross_attention": True}, CROSSING, "LMHeadModel"),
    "deepseek-v2": ("DeepseekV2", MLA, LATENT),
    "deepseek-v3": ("DeepseekV3", MLA, LATENT),
    "minicpm3": ("MiniCPM3", MLA, LATENT),
    "dropout": ("Llama", {"attention_dropout": 0.1}, "attention_dropout=0.1; LRSA supports 0 only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_model_is_refused_and_left_as_it_was(case, tiny, rule):
    family, changes, message, *head = REFUSED[case]
    model = tiny(family, *head, **changes)
    before = model.config._attn_implementation
    with refused("model", reason=message):
        enable(model, rule)
    assert model.config._attn_implementation == before
    assert enabled_config(model) is None


@pytest.mark.parametrize("family", ["StableLm", "Nemotron"])
def test_a_family_that_hands_no_keywords_to_its_attention_is_refused_when_it_runs(family, tiny, tokens, rule):
    model = enable(tiny(family, hidden_act="silu"), rule)
    with refused("model", reason="not supported"):
        model(tokens(1, 20))


class _Bypassing(nn.Module):
    """An attention of a model file that forgot the interface."""

    def __init__(self, own):
        super().__init__()
        self.layer_idx, self.is_causal = own.layer_idx, True

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_the_first_forward_notices_a_layer_that_does_not_call_the_interface(tiny, tokens, rule):
    model = tiny("Llama")
    model.model.layers[1].self_attn = _Bypassing(model.model.layers[1].self_attn)
    enable(model, rule)
    for _ in range(2):
        with refused("model", reason="layers [1] of LlamaForCausalLM"):
            model(tokens(1, 5))


def test_the_attention_set_by_name_alone_is_refused(tiny, tokens, rule):
    enable(tiny("Llama"), rule)  # registers the name
    model = tiny("Llama")
    model.set_attn_implementation("lrsa")
    with refused("model", reason="lrsa_lit.attention.enable"):
        model(tokens(1, 5))
