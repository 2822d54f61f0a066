"""Single-token steps over preallocated rows: the same tokens as without, whatever happens in between."""

import contextlib

import pytest
import torch
from helpers import one_line

from lrsa_lit.attention import LRSACache, enable, graphed_decoding, prefill, using
from lrsa_lit.attention.decoding import Decoder, serving
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import LRSAConfig
from lrsa_lit.ops.sparse_attention.geometry import stored_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def broken_spare_rows(monkeypatch):
    """New memory holds NaN, as it may on any day."""
    fresh = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        made = fresh(tensor, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def counting(decoder):
    """Count the steps of a decoder."""
    steps, step = [], decoder.step
    decoder.step = lambda ids: (steps.append(1), step(ids))[1]
    return steps


@pytest.mark.parametrize("room", [1, 256])
@pytest.mark.parametrize("change", [{}, {"chunk_size": 5}, {"dense_layers": (1,)}], ids=["rule", "chunk", "dense"])
def test_steps_give_the_parallel_pass(change, room, tiny, tokens, rule):
    config, ids = rule.replace(**change), tokens(2, 110)
    model = enable(tiny("Llama"), config)
    cache = LRSACache.of(model)
    logits = [prefill(model, ids[:, :40], cache)]
    decoder = Decoder(model, cache, room=room)
    for at in range(40, 110):
        logits.append(decoder.step(ids[:, at, None]).clone())
        sparse = 2 * stored_size(at + 1, config)
        dense = 2 * (at + 1) if config.dense_layers else sparse
        assert cache.stored_tokens() == [sparse, dense, sparse]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 39:]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 110


def test_the_kernels_give_the_reference(tiny, tokens):
    rule, ids = LRSAConfig(sink_size=2, lag_size=8, top_k=3), tokens(1, 60)
    # Heads of 16 channels: the kernels take no smaller ones.
    model = tiny("Llama", dtype=torch.float32, hidden_size=64, num_key_value_heads=1).to(DEVICE)
    ids, logits = ids.to(DEVICE), {}
    for impl in ("reference", "triton"):
        enable(model, rule, impl=impl)
        cache = LRSACache.of(model)
        parts = [prefill(model, ids[:, :30], cache), prefill(model, ids[:, 30:33], cache)]
        decoder = Decoder(model, cache)
        parts += [decoder.step(ids[:, at, None]).clone() for at in range(33, 60)]
        logits[impl] = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_generate_is_served_but_for_its_first_tokens(rows, tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(rows, 50)
    options = {"do_sample": False, "min_new_tokens": 40, "max_new_tokens": 40, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, past_key_values=LRSACache.of(model), **options)
    decoder = Decoder(model, LRSACache.of(model))
    steps = counting(decoder)
    with serving(model, decoder):
        assert model.generate(ids, past_key_values=decoder.cache, **options).equal(plain)
    # The prompt is a call of its own, and the first token after it finds new memory.
    assert len(steps) == 38


@pytest.mark.parametrize("room", [1, 256])
def test_a_second_turn_and_sampling_go_on(room, tiny, tokens, rule):
    model, texts = enable(tiny("Llama"), rule), []
    for fast in (False, True):
        cache, text = LRSACache.of(model), tokens(1, 30)
        decoder = Decoder(model, cache, room=room)
        with serving(model, decoder) if fast else contextlib.nullcontext():
            for turn in range(3):
                torch.manual_seed(turn)
                more = tokens(1, 9, seed=turn)
                text = torch.cat([text, more], dim=1)
                mask = torch.ones_like(text)
                text = model.generate(
                    text, attention_mask=mask, past_key_values=cache, do_sample=True, max_new_tokens=20, pad_token_id=0
                )
        texts.append(text)
    assert texts[0].equal(texts[1])


@pytest.mark.parametrize("change", ["reset", "reorder", "select"])
def test_new_memory_is_noticed(change, tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(2, 60)
    cache = LRSACache.of(model)
    decoder = Decoder(model, cache)
    prefill(model, ids[:, :40], cache)
    for at in range(40, 45):
        decoder.step(ids[:, at, None])
    kept = ids[:, :45]
    if change == "reset":
        cache.reset()
        prefill(model, kept, cache)
    else:
        order = torch.tensor([1, 0] if change == "reorder" else [1])
        cache.reorder_cache(order)
        ids = ids[order]
    # Twice, as a search asks: the second time the memory is the one of the call before.
    ready = [decoder.ready(), decoder.ready()]
    assert ready == [False, True]
    logits = [decoder.step(ids[:, at, None]).clone() for at in range(45, 60)]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 45:]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)


def test_rows_that_are_reordered_or_unequal_are_not_served(tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(2, 40)
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :11] = 0
    for given, search in ((mask, {"num_beams": 2}), (padded, {})):
        options = {"do_sample": False, "max_new_tokens": 15, "attention_mask": given, "pad_token_id": 0, **search}
        plain = model.generate(ids, past_key_values=LRSACache.of(model), **options)
        decoder = Decoder(model, LRSACache.of(model))
        steps = counting(decoder)
        with serving(model, decoder):
            assert model.generate(ids, past_key_values=decoder.cache, **options).equal(plain)
        assert not steps


def test_another_rule_is_refused_in_the_block_too(tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(1, 50)
    decoder = Decoder(model, LRSACache.of(model))
    with serving(model, decoder):
        for at in (40, 41, 42):
            model(input_ids=ids[:, :40] if at == 40 else ids[:, at - 1, None], past_key_values=decoder.cache)
        with using(model, rule.replace(top_k=1)), pytest.raises(UserError) as caught:
            model(input_ids=ids[:, 42, None], past_key_values=decoder.cache)
    assert one_line(caught.value).startswith("past_key_values: the LRSACache has 3 layers")
    assert "forward" not in vars(model)


def test_without_a_graph_to_replay_nothing_changes(tiny, rule):
    model = enable(tiny("Llama"), rule)
    with graphed_decoding(model, LRSACache.of(model)):
        assert model.forward.__func__ is type(model).forward


def test_a_plain_model_is_refused(tiny, rule):
    model = tiny("Llama")
    with pytest.raises(UserError) as caught, graphed_decoding(model, LRSACache.of(model, rule)):
        pass
    assert one_line(caught.value).startswith("model, cache: graphed_decoding needs")
