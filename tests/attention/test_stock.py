"""The compressed cache under a model's stock attention, and ``prefill``, which feeds it call by call."""

import gc

import pytest
import torch
from helpers import refused
from transformers import DynamicCache

from lrsa_lit.attention import LRSACache, disable, enable, enabled_config, prefill
from lrsa_lit.ops.sparse_attention import QueryAttention, stored_size


@torch.no_grad()
def parallel(model, rule, ids):
    """Logits of the whole row under LRSA attention."""
    return enable(model, rule)(ids, use_cache=False).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Qwen3", "SmolLM3"])
@pytest.mark.parametrize(
    "change", [{}, {"chunk_size": 5}, {"sink_size": 0, "top_k": 0}], ids=["rule", "chunk", "window"]
)
def test_prefill_and_single_tokens_give_the_parallel_pass(family, change, tiny, tokens, rule):
    config, ids = rule.replace(**change), tokens(2, 90)
    model = tiny(family)
    cache = LRSACache.of(model, config)
    logits = [prefill(model, ids[:, :60], cache)]
    with torch.no_grad():
        logits += [model(ids[:, at, None], past_key_values=cache).logits for at in range(60, 90)]
    assert cache.stored_tokens() == [2 * stored_size(90, config.rule)] * 3
    assert cache.get_seq_length() == 90
    assert enabled_config(model) is None
    close(torch.cat(logits, dim=1), parallel(model, config, ids)[:, 59:])


def test_all_columns_of_the_calls_are_those_of_the_parallel_pass(tiny, tokens, rule):
    model, ids, parts = tiny("Llama"), tokens(1, 80), []
    cache, start = LRSACache.of(model, rule), 0
    first, chunk = rule.rule.first_compression, rule.rule.chunk
    for stop in (first - 3, first, first + 1, first + chunk, 80):
        while start < stop:
            end = min(stop, start + 4 if start < first else first + ((start - first) // chunk + 1) * chunk)
            with torch.no_grad():
                parts.append(model(ids[:, start:end], past_key_values=cache).logits)
            start = end
            assert cache.stored_tokens() == [stored_size(start, rule.rule)] * 3
    close(torch.cat(parts, dim=1), parallel(model, rule, ids))


@pytest.mark.parametrize("size", [1, 7, 8192])
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "stock"])
def test_prefill_gives_the_last_logits_and_tells_how_far_it_is(enabled, size, tiny, tokens, rule):
    model, ids, told = tiny("Llama"), tokens(2, 90), []
    if enabled:
        enable(model, rule)
    cache = LRSACache.of(model, None if enabled else rule)
    prefill(model, ids[:, :50], cache, tokens_per_call=size)
    logits = prefill(model, ids[:, 50:], cache, tokens_per_call=size, progress=told.append)
    assert logits.shape[:2] == (2, 1)
    assert told[-1] == 40
    assert told == sorted(set(told))
    close(logits, parallel(model, rule, ids)[:, -1:])


def test_prefill_feeds_any_cache(tiny, tokens):
    model, ids = tiny("Llama"), tokens(2, 50)
    logits = prefill(model, ids, DynamicCache(), tokens_per_call=9)
    close(logits, model(ids).logits[:, -1:])


def test_prefill_takes_padded_rows_of_an_enabled_model(tiny, tokens, rule):
    model = enable(tiny("Llama"), rule)
    short, long = tokens(1, 30, seed=1), tokens(1, 80)
    ids = torch.cat([torch.cat([torch.zeros(1, 50, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    logits = prefill(model, ids, LRSACache.of(model), attention_mask=mask, tokens_per_call=11)
    close(logits, torch.cat([parallel(model, rule, row)[:, -1:] for row in (short, long)]))


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generating_after_prefill_is_what_the_enabled_model_generates(search, tiny, tokens, rule):
    ids, texts = tokens(1, 70), []
    for enabled in (True, False):
        model = tiny("Llama")
        if enabled:
            enable(model, rule)
        cache = LRSACache.of(model, None if enabled else rule)
        prefill(model, ids[:, :-1], cache)
        cache.batch_repeat_interleave(search.get("num_beams", 1))
        options = {"do_sample": False, "max_new_tokens": 25, "pad_token_id": 0, **search}
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options))
    assert texts[0].equal(texts[1])
    assert texts[0].shape[1] > ids.shape[1]


def test_a_call_over_a_compression_is_refused_and_nothing_is_taken_in(tiny, tokens, rule):
    model, ids = tiny("Llama"), tokens(1, 90)
    cache = LRSACache.of(model, rule)
    with refused("input_ids", reason="90 tokens after 0 "):
        model(ids, past_key_values=cache)
    assert cache.stored_tokens() == [0, 0, 0]
    prefill(model, ids, cache)
    crossing = tokens(1, 2 * rule.rule.chunk)
    with refused("input_ids", reason="tokens after 90 "):
        model(crossing, past_key_values=cache)
    assert cache.stored_tokens() == [stored_size(90, rule.rule)] * 3


def test_pads_are_refused(tiny, tokens, rule):
    model, mask = tiny("Llama"), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    cache = LRSACache.of(model, rule)
    with refused("attention_mask", reason="does not support pads"):
        model(tokens(2, 10), attention_mask=mask, past_key_values=cache)


def test_rows_of_unequal_lengths_are_not_continued(tiny, tokens, rule):
    model, mask = tiny("Llama"), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    cache = LRSACache.of(model, rule)
    enable(model, rule)(tokens(2, 10), attention_mask=mask, past_key_values=cache)
    disable(model)
    with refused("cache", reason="unequal lengths"):
        model(tokens(2, 1), past_key_values=cache)


def test_rules_that_do_not_fit_are_refused(tiny, tokens, rule):
    model = tiny("Llama")
    with refused("config"):
        LRSACache.of(model)
    with refused("config.dense_layers", (0,)):
        LRSACache.of(model, rule.replace(dense_layers=(0,)))
    with refused("config.compressor", "QueryAttention", reason="no queries"):
        LRSACache.of(model, rule.replace(compressor=QueryAttention(window=3)))
    enable(model, rule)
    assert LRSACache.of(model, rule).config == rule
    with refused("config", rule.replace(top_k=1)):
        LRSACache.of(model, rule.replace(top_k=1))


def test_weights_trained_with_another_rule_are_named(tiny, rule, caplog):
    model = tiny("Llama")
    model.config.lrsa = rule.replace(top_k=2).to_dict()
    LRSACache.of(model, rule.replace(sink_size=1))
    assert "trained with" in caplog.text
    assert "'top_k': 2" in caplog.text


def test_a_cache_of_other_heads_is_refused(tiny, tokens, rule):
    small, large = enable(tiny("Llama"), rule), enable(tiny("Llama", num_key_value_heads=4), rule)
    cache = LRSACache.of(small)
    prefill(small, tokens(1, 20), cache)
    with refused("cache", reason="2 heads of"):
        large(tokens(1, 5), past_key_values=cache)


def test_the_watch_goes_with_the_cache(tiny, rule):
    model = tiny("Llama")
    before = len(model.base_model._forward_pre_hooks)
    cache = LRSACache.of(model, rule)
    assert len(model.base_model._forward_pre_hooks) == before + 1
    del cache
    gc.collect()
    assert len(model.base_model._forward_pre_hooks) == before


@pytest.mark.parametrize(("count", "size"), [(0, 5), (5, 0)])
def test_nothing_to_feed_is_refused(count, size, tiny, tokens):
    with refused("input_ids, tokens_per_call"):
        prefill(tiny("Llama"), tokens(1, 5)[:, :count], DynamicCache(), tokens_per_call=size)
