"""Attaching the rule to a model, taking it off, running a block under another one, saving and loading."""

import copy
import logging
import pickle

import pytest
import torch
from helpers import refused
from transformers import AutoModelForCausalLM

from lrsa_lit.attention import (
    LRSACache,
    LRSAConfig,
    dense_pass,
    disable,
    enable,
    enabled_config,
    interface,
    prefill,
    using,
)
from lrsa_lit.attention.attached import RULE, enabled_state
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import RandomTokens, Recency
from lrsa_lit.systems import FreqKV


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def test_enable_returns_the_model_and_writes_the_rule(tiny, rule):
    model = tiny("Llama")
    assert enabled_config(model) is None
    assert enable(model, rule) is model
    assert enabled_config(model) == rule
    assert LRSAConfig.from_dict(model.config.lrsa) == rule


def test_enabling_again_replaces_the_rule(tiny, tokens, rule):
    ids, other = tokens(1, 70), rule.replace(top_k=1)
    twice = enable(enable(tiny("Llama"), rule), other)
    assert enabled_config(twice) == other
    assert logits(twice, ids).equal(logits(enable(tiny("Llama"), other), ids))
    disable(twice)
    assert logits(twice, ids).equal(logits(tiny("Llama"), ids))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_rule_of_its_own(duplicate, tiny, tokens, rule):
    ids, other = tokens(1, 70), rule.replace(top_k=1)
    model = enable(tiny("Llama"), rule)
    copied = duplicate(model)
    # The copy runs first: it must not ask the original whether its layers were called.
    expected = logits(copied, ids)
    assert logits(model, ids).equal(expected)
    enable(copied, other)
    assert enabled_config(model) == rule
    assert logits(model, ids).equal(expected)
    assert not logits(copied, ids).equal(expected)


def test_disable_leaves_no_trace(tiny, tokens, rule):
    model = tiny("Llama")
    before, attributes = model.config.to_dict(), [set(vars(module)) for module in model.modules()]
    disable(enable(model, rule))
    disable(model)
    assert model.config.to_dict() == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert logits(model, tokens(1, 70)).equal(logits(tiny("Llama"), tokens(1, 70)))


def test_a_refused_rule_leaves_the_rule_before_it(tiny, tokens, rule):
    model = enable(tiny("Llama"), rule)
    before = logits(model, tokens(1, 70))
    with refused("dense_layers", [3]):
        enable(model, rule.replace(dense_layers=(1, 3)))
    assert enabled_config(model) == rule
    assert logits(model, tokens(1, 70)).equal(before)


@pytest.mark.parametrize("own", [None, LRSAConfig(2, 8, 3)], ids=["dense", "enabled"])
@pytest.mark.parametrize("inside", [None, LRSAConfig(2, 8, 1), LRSAConfig(2, 8, 3)], ids=["dense", "K=1", "K=3"])
def test_using_restores_even_after_an_exception(own, inside, tiny, tokens):
    model, ids = tiny("Llama"), tokens(1, 70)
    if own is not None:
        enable(model, own)
    before = logits(model, ids)
    fresh = tiny("Llama")
    expected = logits(fresh if inside is None else enable(fresh, inside), ids)

    def fail_inside():
        with using(model, inside):
            assert enabled_config(model) == inside
            assert logits(model, ids).equal(expected)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert enabled_config(model) == own
    assert logits(model, ids).equal(before)


@pytest.mark.parametrize("kind", ["padded right", "padded left", "packed"])
def test_a_dense_pass_is_the_model_without_a_rule_and_attaches_nothing(kind, tiny, tokens, rule):
    config, ids = rule.replace(dense_layers=(1,)), tokens(2, 70)
    model, mask = enable(tiny("Llama"), config), torch.ones_like(ids)
    if kind == "packed":
        inputs = {"position_ids": torch.cat([torch.arange(30), torch.arange(40)]).expand(2, -1)}
    else:
        mask[0, 55:] = mask[1, 69:] = 0
        mask = mask.flip(1) if kind == "padded left" else mask
        inputs = {"attention_mask": mask}

    @torch.no_grad()
    def run():
        return model(ids, use_cache=False, **inputs).logits[mask.bool()]

    with using(model, None):
        expected = run()
    before, state = run(), enabled_state(model)

    def attached():
        return [(each, each.rule, each.rule_tensor) for each in (getattr(module, RULE) for module in state.modules)]

    rules = attached()

    def fail_inside():
        with dense_pass(model):
            torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
            assert enabled_state(model) is state
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert enabled_state(model) is state
    assert attached() == rules
    assert run().equal(before)
    assert not torch.allclose(before, expected)


def test_a_dense_pass_of_a_model_without_a_rule(tiny, tokens):
    model, ids = tiny("Llama"), tokens(1, 70)
    expected = logits(model, ids)
    with dense_pass(model):
        assert logits(model, ids).equal(expected)


def test_using_restores_when_the_rule_is_refused(tiny, rule):
    model = enable(tiny("Llama"), rule)
    with pytest.raises(UserError), using(model, rule.replace(dense_layers=(9,))):
        raise AssertionError("unreachable")
    assert enabled_config(model) == rule


def test_using_restores_the_implementation_too(tiny, rule, monkeypatch, tokens):
    asked = []

    def spy(*args, impl, **kwargs):
        asked.append(impl)
        return args[0]

    monkeypatch.setattr(interface, "sparse_attention", spy)
    model = enable(tiny("Llama"), rule, impl="eager")
    for inside in (rule.replace(top_k=1), None):
        with using(model, inside, impl="auto"):
            logits(model, tokens(1, 5))
        logits(model, tokens(1, 5))
    with using(model, rule, impl="auto"):
        logits(model, tokens(1, 5))
    assert asked == ["auto"] * 3 + ["eager"] * 6 + ["auto"] * 3


def test_the_rule_is_saved_and_a_reloaded_model_runs_it(tiny, tokens, rule, tmp_path):
    config = rule.replace(dense_layers=(1,), compressor=RandomTokens(seed=5))
    model, ids = enable(tiny("Llama", dtype=torch.float32), config), tokens(1, 70)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert enabled_config(again) is None
    assert logits(again, ids).equal(logits(tiny("Llama", dtype=torch.float32), ids))
    enable(again, LRSAConfig.from_dict(again.config.lrsa))
    assert enabled_config(again) == config
    assert logits(again, ids).equal(logits(model, ids))


@torch.no_grad()
def test_a_reloaded_model_takes_the_rule_that_it_was_saved_with(tiny, tokens, rule, tmp_path):
    config = rule.replace(compressor=RandomTokens(seed=5))
    model, ids = enable(tiny("Llama", dtype=torch.float32), config), tokens(1, 70)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    cache = LRSACache.of(again)
    assert cache.config == config
    prefill(again, ids[:, :-1], cache)
    expected = logits(model, ids)
    assert again(ids[:, -1:], past_key_values=cache).logits.allclose(expected[:, -1:], atol=1e-4)
    assert enabled_config(enable(again)) == LRSAConfig(**again.config.lrsa) == config
    assert logits(again, ids).equal(expected)


@pytest.mark.parametrize("call", [enable, LRSACache.of], ids=["enable", "cache"])
@pytest.mark.parametrize(
    ("stored", "field"),
    [
        (None, "config"),
        ({"lag": 3}, "config.lrsa.lag"),
        ([3], "config.lrsa.values"),
        ({"compressor": {"class_path": "os.system"}}, "config.lrsa.compressor"),
    ],
    ids=["none", "unknown-setting", "list", "foreign-class"],
)
def test_a_model_without_a_valid_rule_needs_one(stored, field, call, tiny):
    model = tiny("Llama")
    if stored is not None:
        model.config.lrsa = stored
    with refused(field):
        call(model)
    assert enabled_config(model) is None


def test_a_reloaded_model_keeps_the_rule_it_was_trained_with_in_its_config(tiny, rule, tmp_path, caplog):
    enable(tiny("Llama"), rule).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger=interface.__name__):
        enable(again, rule)
        assert not caplog.records
        enable(again, rule.replace(top_k=1))
    assert "trained with" in caplog.text
    disable(again)
    assert again.config.lrsa == rule.to_dict()


def test_weights_trained_with_a_system_name_it(tiny, rule, caplog):
    model, system = tiny("Llama"), LRSAConfig(lag_size=64, system=FreqKV(capacity=20))
    model.config.lrsa = system.to_dict()
    # A model of low rank has said so.
    caplog.clear()
    with using(model, system.replace(lag_size=32)):
        pass
    assert not caplog.records, "no system reads it"
    with using(model, rule):
        pass
    (line,) = caplog.messages
    assert line.startswith("the weights were trained with the system FreqKV {'capacity': 20, ")
    assert line.endswith(f" and now run with {rule.to_dict()}")
    caplog.clear()
    with using(model, system.replace(dense_layers=(1,))):
        pass
    assert caplog.messages[0].endswith("'gamma': 0.5, 'dense_layers': [1]}")


def test_random_layers_lose_different_tokens(tiny, rule):
    model = enable(tiny("Llama"), rule.replace(compressor=RandomTokens(seed=5)))
    rules = [vars(module)["_lrsa_rule"] for module in model.modules() if "_lrsa_rule" in vars(module)]
    assert len({each.rule.compressor.seed for each in rules}) == 3


def test_the_compressor_of_the_rule_is_the_one_that_runs(tiny, tokens, rule):
    ids = tokens(1, 70)
    recent = logits(enable(tiny("Llama"), rule.replace(compressor=Recency())), ids)
    assert not torch.allclose(recent, logits(enable(tiny("Llama"), rule), ids), atol=1e-2)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_the_attention_before_is_the_attention_after(own, tiny, rule):
    model = tiny("Llama")
    model.set_attn_implementation(own)
    disable(enable(model, rule))
    assert model.config._attn_implementation == own
