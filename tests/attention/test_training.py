"""Training through the seam: gradients, gradient checkpointing, dense layers, LoRA."""

import peft
import pytest
import torch

from lrsa_lit.attention import disable, enable, enabled_config, interface
from lrsa_lit.ops.sparse_attention import StraightThrough, TokenGate


def of_keys(named):
    """The name of a weight that makes keys; a projection of low rank has several."""
    return next(name for name in named if "layers.1.self_attn.k_proj." in name)


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """How often each layer ran the operator."""
    counted = []
    original = interface.sparse_attention

    def spy(*args, **kwargs):
        counted.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(interface, "sparse_attention", spy)
    return counted


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensor-hooks"])
@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])
def test_gradient_checkpointing_recomputes_the_same_bits(tiny, tokens, rule, calls, use_reentrant, padding):
    model, ids = enable(tiny("Llama"), rule).train(), tokens(2, 70)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :9] = 0

    def run():
        model.zero_grad()
        calls.clear()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    plain = run()
    assert len(calls) == 3
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = run()
    assert len(calls) == 6, "each layer runs once more in the backward pass"
    assert all(recomputed[name].equal(plain[name]) for name in plain)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


@pytest.mark.parametrize("compressor", [StraightThrough(), TokenGate()], ids=lambda one: type(one).__name__)
def test_it_trains_packed_and_checkpointed(tiny, tokens, rule, compressor):
    rule, ids = rule.replace(compressor=compressor), [tokens(1, length, seed=length) for length in (45, 70)]
    model = enable(tiny("Llama"), rule).train()
    plain = gradients(enable(tiny("Llama"), rule.replace(compressor="LagRelative")).train(), ids[1])
    alone = [gradients(model, one) for one in ids]
    keys = of_keys(plain)
    assert not torch.allclose(alone[1][keys], plain[keys], rtol=1e-3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packed, places = torch.cat(ids, dim=1), torch.cat([torch.arange(one.shape[1]) for one in ids])[None]
    labels = packed.masked_fill(places == 0, -100)
    model.zero_grad()
    (model(packed, position_ids=places, labels=labels, use_cache=False).loss * (44 + 69)).backward()
    for name, weight in model.named_parameters():
        expected = 44 * alone[0][name] + 69 * alone[1][name]
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_rule_and_not_of_dense_attention(tiny, tokens, rule):
    ids = tokens(1, 70)
    dense = gradients(tiny("Llama"), ids)
    full = gradients(enable(tiny("Llama"), rule.replace(top_k=rule.lag_size)), ids)
    sparse = gradients(enable(tiny("Llama"), rule), ids)
    for name, gradient in dense.items():
        torch.testing.assert_close(full[name], gradient, rtol=1e-4, atol=1e-5)
    name = of_keys(dense)
    assert (sparse[name] - dense[name]).abs().max() > 0.1 * dense[name].abs().max()


def test_a_step_along_the_gradient_lowers_the_loss(tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(1, 70)
    model.train()
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_dense_layers_are_the_models_own_attention(tiny, tokens, rule):
    ids = tokens(2, 90)
    dense = tiny("Llama")(ids, use_cache=False).logits
    runs = {}
    for layers in [(), (0,), (1,), (0, 1, 2)]:
        model = enable(tiny("Llama"), rule.replace(dense_layers=layers))
        runs[layers] = model(ids, use_cache=False).logits
    assert runs[0, 1, 2].equal(dense)
    kinds = [dense, runs[()], runs[(0,)], runs[(1,)]]
    for index, one in enumerate(kinds):
        for other in kinds[:index]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("own", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_dense_layers_are_causal_whatever_attention_the_model_had(own, tiny, tokens, rule):
    model, ids = tiny("Llama"), tokens(1, 40)
    dense = model(ids, use_cache=False).logits
    model.set_attn_implementation(own)
    enable(model, rule.replace(dense_layers=(0, 1, 2)))
    torch.testing.assert_close(model(ids, use_cache=False).logits, dense, rtol=0, atol=1e-5)


@torch.no_grad()
def test_all_dense_layers_over_an_uncompressed_cache(tiny, tokens, rule):
    ids = tokens(2, 70)
    model = tiny("Llama")
    dense = model(ids, use_cache=False).logits
    enable(model, rule.replace(dense_layers=(0, 1, 2)))
    cache, parts, start = None, [], 0
    for size in (30, 25, 1, 14):
        output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + size
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), dense, rtol=0, atol=1e-5)


def lora(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole = isinstance(model.model.layers[0].self_attn.v_proj, torch.nn.Linear)
        targets = ["q_proj", "v_proj" if whole else "v_proj.down"]
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["enable-then-wrap", "wrap-then-enable"])
def test_a_lora_model_runs_the_rule_and_trains_its_adapters_only(order, tiny, tokens, rule):
    ids = tokens(1, 70)
    dense = lora(tiny("Llama"))(ids, use_cache=False).logits
    model = enable(lora(tiny("Llama")), rule) if order == "wrap-then-enable" else lora(enable(tiny("Llama"), rule))
    assert enabled_config(model) == rule
    assert (model(ids, use_cache=False).logits - dense).abs().max() > 0.1
    trained = gradients(model, ids)
    assert trained
    assert all("lora_" in name and gradient.abs().sum() > 0 for name, gradient in trained.items())
    disable(model)
    assert enabled_config(model) is None
    assert model(ids, use_cache=False).logits.equal(dense)


def test_a_lora_model_with_gradient_checkpointing(tiny, tokens, rule, calls):
    model, ids = enable(lora(tiny("Llama")), rule).train(), tokens(1, 70)
    plain = gradients(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    calls.clear()
    recomputed = gradients(model, ids)
    assert len(calls) == 6
    assert all(recomputed[name].equal(plain[name]) for name in plain)
