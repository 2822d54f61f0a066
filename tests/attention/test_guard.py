"""Each layer of a cache stores and attends once per call; else the cache is refused until it is reset."""

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import refused
from torch.utils.checkpoint import checkpoint

from lrsa_lit.attention import LAYOUT, LRSACache, disable, enable, observing, packed_layout, prefill
from lrsa_lit.attention.cache_layer import LRSACacheLayer
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.ops.sparse_attention import KeyValueStream


@pytest.fixture
def model(tiny, rule):
    return enable(tiny("Llama"), rule)


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def interrupted(monkeypatch, owner, name, at, after):
    """Let the call number ``at`` of a method be interrupted, before or after its work."""
    own, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == at and not after:
            interrupt()
        result = own(self, *args, **kwargs)
        if len(calls) == at:
            interrupt()
        return result

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(LRSACacheLayer, "update"), (LRSACacheLayer, "attend"), (KeyValueStream, "attend"), (KeyValueStream, "_compress")],
    ids=["update", "attend", "store", "compress"],
)
def test_a_call_that_is_interrupted_is_as_if_it_was_not_or_the_next_is_refused(
    owner, name, at, after, model, tokens, rule, monkeypatch
):
    ids, cache = tokens(1, 90), LRSACache.of(model)
    whole = model(ids, use_cache=False).logits
    feed(model, cache, ids[:, :50])
    with monkeypatch.context() as patch:
        interrupted(patch, owner, name, at, after)
        with pytest.raises(KeyboardInterrupt):
            feed(model, cache, ids[:, 50:])
    if at == 1 and owner is LRSACacheLayer and not (name == "attend" and after):
        # The first layer alone was reached, and had stored nothing.
        assert cache.get_seq_length() == 50
        close(feed(model, cache, ids[:, 50:]), whole[:, 50:])
    elif at == 3 and owner is LRSACacheLayer and name == "attend" and after:
        # The last layer had stored everything.
        assert cache.get_seq_length() == 90
        more = tokens(1, 5, seed=1)
        close(feed(model, cache, more), model(torch.cat([ids, more], 1), use_cache=False).logits[:, 90:])
    else:
        for _ in range(2):
            with refused("cache", reason="exception"):
                feed(model, cache, ids[:, 50:])
        with refused("cache", reason="exception"):
            feed(model, copy.deepcopy(cache), ids[:, 50:])
        cache.reset()
        close(feed(model, cache, ids), whole)


@pytest.mark.parametrize("stock", [False, True], ids=["enabled", "stock"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_exception_in_front_of_a_layer(layer, stock, tiny, tokens, rule):
    model, ids = tiny("Llama"), tokens(2, 40)
    cache = LRSACache.of(model, rule) if stock else LRSACache.of(enable(model, rule))
    prefill(model, ids[:, :30], cache)
    hook = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids[:, 30:31])
    hook.remove()
    if layer == 0:
        close(feed(model, cache, ids[:, 30:31]), enable(model, rule)(ids[:, :31], use_cache=False).logits[:, 30:])
    else:
        with refused("cache", reason="exception"):
            feed(model, cache, ids[:, 30:31])


def test_a_first_call_that_failed_binds_nobody_to_its_rows(model, tokens):
    cache = LRSACache.of(model)
    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, tokens(4, 20))
    hook.remove()
    close(feed(model, cache, tokens(2, 20)), model(tokens(2, 20), use_cache=False).logits)


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("change", ["batch_select_indices", "batch_repeat_interleave"])
def test_rows_of_which_some_layers_alone_were_changed_are_refused(change, padding, model, tokens, monkeypatch):
    ids, mask, cache = tokens(2, 40), torch.ones(2, 40, dtype=torch.long), LRSACache.of(model)
    mask[0, :9] = 0 if padding else 1
    feed(model, cache, ids, mask)
    with monkeypatch.context() as patch:
        interrupted(patch, LRSACacheLayer, change, 2, after=False)
        with pytest.raises(KeyboardInterrupt):
            getattr(cache, change)(torch.tensor([1, 0]) if change == "batch_select_indices" else 1)
    with refused("cache", reason="exception"):
        feed(model, cache, tokens(2, 3))
    cache.reset()
    close(feed(model, cache, ids[1:]), model(ids[1:], use_cache=False).logits)


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_rows_are_selected_by_a_bool_tensor(padding, model, tokens):
    ids, mask, cache = tokens(3, 40), torch.ones(3, 40, dtype=torch.long), LRSACache.of(model)
    mask[0, :9] = 0 if padding else 1
    feed(model, cache, ids, mask)
    cache.batch_select_indices(torch.tensor([False, True, True]))
    more = tokens(2, 9)
    close(feed(model, cache, more), model(torch.cat([ids[1:], more], 1), use_cache=False).logits[:, 40:])


@pytest.mark.parametrize("name", ["_begin", "count"])
@torch.no_grad()
def test_a_decoders_step_that_was_interrupted_is_not_continued(name, model, tokens, monkeypatch):
    cache, ids = LRSACache.of(model), tokens(1, 60)
    feed(model, cache, ids)
    decoder = Decoder(model, cache)
    decoder.note_order()
    while not cache.layers[0].streams[0].due:
        decoder.step(ids[:, :1])
    assert decoder.ready(rows=1)
    with monkeypatch.context() as patch:
        interrupted(patch, KeyValueStream, name, 2, after=False)
        with pytest.raises(KeyboardInterrupt):
            decoder.step(ids[:, :1])
    assert not decoder.ready(rows=1)
    with refused("cache", reason="exception"):
        feed(model, cache, ids[:, :1])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensor-hooks"])
def test_gradient_checkpointing_takes_no_cache(use_reentrant, model, tokens):
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with refused("cache", reason="attend once"):
        model(tokens(1, 30), labels=tokens(1, 30), past_key_values=LRSACache.of(model)).loss.backward()


def test_layers_that_run_again_in_the_backward_pass_are_refused(model, tokens, monkeypatch):
    layer = model.model.layers[1]
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs))
    loss = model(tokens(1, 30), labels=tokens(1, 30), past_key_values=LRSACache.of(model)).loss
    with refused("cache", reason="gradient checkpointing"):
        loss.backward()


def test_a_gradient_through_a_cache_is_that_of_the_parallel_pass(model, tokens):
    ids, cache = tokens(1, 60), LRSACache.of(model)
    model(ids, use_cache=False).logits.square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    torch.cat([model(part, past_key_values=cache).logits for part in ids.split(20, 1)], 1).square().sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_cache", [False, True], ids=["no-cache", "cache"])
def test_an_attention_that_was_switched_behind_lrsa_is_refused(with_cache, model, tokens, rule):
    cache = LRSACache.of(model) if with_cache else None
    model.set_attn_implementation("sdpa")
    with refused("model", reason="'sdpa'"):
        model(tokens(1, 40), past_key_values=cache)
    enable(model, rule)
    close(feed(model, LRSACache.of(model), tokens(1, 40)), model(tokens(1, 40), use_cache=False).logits)
    model.set_attn_implementation("eager")
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_is_skipped_is_noticed(model, tokens):
    feed(model, LRSACache.of(model), tokens(1, 5))
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with refused("cache", reason="layers [1]"):
        feed(model, LRSACache.of(model), tokens(1, 40))


@pytest.mark.parametrize("with_cache", [False, True], ids=["no-cache", "cache"])
def test_a_family_that_attends_twice_in_a_layer_is_refused(with_cache, tiny, tokens, rule):
    model = enable(tiny("DiffLlama"), rule)
    for _ in range(2):
        with refused("model", reason="layer 0"):
            feed(model, LRSACache.of(model) if with_cache else None, tokens(1, 40))


def test_threads_share_a_model_from_its_first_call_on(model, tokens, rule):
    expected = model(tokens(1, 40), use_cache=False).logits
    enable(model, rule)
    together = threading.Barrier(2)

    def first_call(_):
        try:
            return model(tokens(1, 40), use_cache=False).logits
        except BaseException:
            together.abort()
            raise

    def wait(*_):
        together.wait()

    # Both threads have begun before either attends, and both have attended in the first layer before either goes on.
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(wait)
    layer.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        for logits in threads.map(first_call, range(2)):
            assert logits.equal(expected)


def test_a_layout_may_be_handed_in_again_after_a_call_that_failed(model, tokens):
    given = {LAYOUT: packed_layout([0, 15, 40]), "position_ids": torch.tensor([[*range(15), *range(25)]])}
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, 40), use_cache=False, **given)
    hook.remove()
    first, again = (model(tokens(1, 40), use_cache=False, **given).logits for _ in range(2))
    assert first.equal(again)


def test_a_family_that_attends_to_other_keys_than_it_stores_takes_no_cache(tiny, tokens, rule):
    model = enable(tiny("JetMoe", kv_channels=8, num_local_experts=2, num_experts_per_tok=2), rule)
    assert feed(model, None, tokens(1, 40)).isfinite().all()
    with refused("cache", reason="attend once"):
        feed(model, LRSACache.of(model), tokens(1, 40))


def test_an_observed_call_leaves_the_cache_as_it_was(model, tokens):
    cache, ids = LRSACache.of(model), tokens(1, 60)
    feed(model, cache, ids[:, :30])
    with observing(model, lambda *_: None), refused("past_key_values"):
        feed(model, cache, ids[:, 30:])
    close(feed(model, cache, ids[:, 30:]), model(ids, use_cache=False).logits[:, 30:])


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["copy", "pickle"])
@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_a_copy_goes_on_like_the_original(padding, duplicate, model, tokens):
    ids, mask, cache = tokens(2, 60), torch.ones(2, 60, dtype=torch.long), LRSACache.of(model)
    mask[0, :9] = 0 if padding else 1
    feed(model, cache, ids, mask)
    copied, more, others = duplicate(cache), tokens(2, 30), tokens(2, 30, seed=1)
    fresh = duplicate(cache)
    expected = feed(model, cache, more)
    close(feed(model, copied, others[:, :1]), feed(model, fresh, others)[:, :1])
    close(feed(model, duplicate(copied), others[:, 1:]), feed(model, copied, others[:, 1:]))
    assert (expected - feed(model, LRSACache.of(model), more)).abs().max() > 1e-2, "the past must matter"


@pytest.mark.parametrize("original_goes", [False, True], ids=["both", "copy-alone"])
def test_a_copy_for_stock_attention_goes_on_like_the_original(original_goes, tiny, tokens, rule):
    model, ids = tiny("Llama"), tokens(1, 90)
    cache = LRSACache.of(model, rule)
    prefill(model, ids[:, :80], cache)
    copied = copy.deepcopy(copy.deepcopy(cache))
    expected = prefill(model, ids[:, 80:], cache)
    if original_goes:
        cache = None
        gc.collect()
    close(prefill(model, ids[:, 80:], copied), expected)
    mask = torch.zeros(1, 91, dtype=torch.long)
    with refused("attention_mask"):
        feed(model, copied, ids[:, :1], mask)
    copied = cache = None
    gc.collect()
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks


def test_a_pickled_cache_for_stock_attention_belongs_to_no_model(tiny, tokens, rule):
    model, ids = tiny("Llama"), tokens(1, 60)
    cache = LRSACache.of(model, rule)
    prefill(model, ids[:, :40], cache)
    loaded = pickled(cache)
    with refused("cache", reason="needs a model with LRSA"):
        feed(model, loaded, ids[:, 40:41])
    with refused("cache", reason="needs a model with LRSA"):
        feed(pickled(model), cache, ids[:, 40:41])
    close(feed(enable(model, rule), loaded, ids[:, 40:]), model(ids, use_cache=False).logits[:, 40:])


def test_stock_attention_with_gradient_checkpointing_takes_no_cache(tiny, tokens, rule):
    model = tiny("Llama").train()
    model.gradient_checkpointing_enable()
    cache = LRSACache.of(model, rule)
    with refused("cache", reason="layers [0, 1, 2]"):
        model(tokens(1, 10), past_key_values=cache)
