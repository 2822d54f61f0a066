"""Gates of tokens in a model: whose hidden states they score, and what is refused."""

import copy

import pytest
import torch
from helpers import refused
from safetensors.torch import save_file
from transformers import DynamicCache

from lrsa_lit.analysis.capture import capture
from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, disable, enable, using
from lrsa_lit.attention.interface import dense_pass
from lrsa_lit.ops.sparse_attention import TokenGate


@pytest.fixture
def gates(tmp_path):
    drawn = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    save_file({"token_gates": drawn}, tmp_path / "gates.safetensors")
    return TokenGate(str(tmp_path / "gates.safetensors")), drawn


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_each_layer_keeps_what_its_gate_scores_highest(family, tiny, tokens, gates):
    compressor, weights = gates
    if family == "GPTNeoX":
        compressor, weights = TokenGate(), torch.stack([TokenGate().gate(n, 3, 4, 32) for n in range(3)])
    model, ids = tiny(family, num_key_value_heads=weights.shape[1]), tokens(2, 45)
    seen, config = [], LRSAConfig(3, 8, 3, compressor=compressor)
    enable(model, config)
    for name, module in model.named_modules():
        if name.endswith("input_layernorm"):
            module.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad(), capture(model) as found:
        model(ids, use_cache=False)
    (rows,) = found.forwards
    for layer, (hidden, gate) in enumerate(zip(seen, weights, strict=True)):
        scores = hidden @ gate.double().T  # (B, T, H)
        for row, sequence in enumerate(rows):
            for partition in range(sequence.layers[layer].positions.shape[1]):
                start = 3 + 8 * partition
                # The first layer sees equal tokens as equal.
                order = scores[row, start : start + 8].argsort(dim=0, descending=True, stable=True)
                best = order[:3].sort(dim=0).values + start
                assert best.T.tolist() == sequence.layers[layer].positions[:, partition].tolist()


def test_nothing_is_left_behind_and_a_copy_scores_for_itself(tiny, tokens, gates):
    model, ids = tiny("Llama"), tokens(1, 45)
    plain = model(ids, use_cache=False).logits
    config = LRSAConfig(3, 8, 3, compressor=gates[0])
    enable(model, config)
    gated = model(ids, use_cache=False).logits
    assert not torch.allclose(gated, plain)
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(ids, use_cache=False).logits, gated)
    with using(model, config.replace(compressor=TokenGate(seed=4))):
        assert not torch.allclose(model(ids, use_cache=False).logits, gated)
    with dense_pass(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain)
    torch.testing.assert_close(model(ids, use_cache=False).logits, gated)
    disable(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(ids, use_cache=False).logits.equal(plain)
    assert not any("gate." in name for name in model.state_dict() if "mlp" not in name), "gates are no parameters"


def test_dense_layers_score_nothing(tiny, tokens, gates):
    config = LRSAConfig(3, 8, 3, compressor=gates[0], dense_layers=(0, 2))
    model = enable(tiny("Llama"), config)
    scored = [bool(layer.self_attn._forward_pre_hooks) for layer in model.model.layers]
    assert scored == [False, True, False]
    ids, cache = tokens(1, 45), LRSACache.of(model)
    parts = [model(ids[:, part], **cache_argument(model, cache)).logits for part in (slice(30), slice(30, 45))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def test_what_cannot_carry_scores_is_refused(tiny, tokens, gates):
    model, config = tiny("Llama"), LRSAConfig(3, 8, 3, compressor=gates[0])
    with refused("config.compressor", "TokenGate", reason="stock attention does not score tokens"):
        LRSACache.of(model, config)
    enable(model, config)
    past = DynamicCache()
    model(tokens(1, 30), **cache_argument(model, past))
    with refused("past_key_values", reason="does not hold the token scores"):
        model(tokens(1, 3), **cache_argument(model, past))
    with refused("compressor.init_args.weights", reason="the model has 3 of 2 and width 16"):
        enable(tiny("Llama", hidden_size=16, num_attention_heads=2, head_dim=8), config)
