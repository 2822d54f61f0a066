"""Single-token steps over preallocated rows: the same tokens as without, whatever happens in between."""

import contextlib
import gc
import itertools
import weakref

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSACache, LRSAConfig, enable, graphed_decoding, prefill, using
from lrsa_lit.attention.decoding import Decoder, serving
from lrsa_lit.attention.decoding.decoder import _waits_for_lengths
from lrsa_lit.ops.sparse_attention import QueryAttention, QueryRuns, stored_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANGES = {
    "rule": {},
    "chunk": {"chunk_size": 5},
    "dense": {"dense_layers": (1,)},
    "queries": {"compressor": QueryAttention(window=3), "dense_layers": (1,)},
    "queries-chunk": {"compressor": QueryRuns(window=2, size=3, shared_heads=True), "chunk_size": 5},
}
"""Of the rule; with dense_layers the middle one of three is dense."""


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
    decoder.step = lambda *given: (steps.append(1), step(*given))[1]
    return steps


@pytest.mark.parametrize("room", [1, 256])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_steps_give_the_parallel_pass(change, room, tiny, tokens, rule):
    config, ids = rule.replace(**change), tokens(2, 110)
    model = enable(tiny("Llama"), config)
    cache = LRSACache.of(model)
    logits = [prefill(model, ids[:, :40], cache)]
    decoder = Decoder(model, cache, room=room)
    for at in range(40, 110):
        logits.append(decoder.step(ids[:, at, None]).clone())
        sparse = 2 * stored_size(at + 1, config.rule)
        dense = 2 * (at + 1) if config.dense_layers else sparse
        assert cache.stored_tokens() == [sparse, dense, sparse]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 39:]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 110


@pytest.mark.parametrize("pads", [0, 13], ids=["equal", "unequal"])
def test_the_kernels_give_what_eager_pytorch_gives(pads, tiny, tokens):
    rule, ids = LRSAConfig(sink_size=2, lag_size=8, top_k=3), tokens(2, 46)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    # Heads of 16 channels: the kernels take no smaller ones.
    model = tiny("Llama", dtype=torch.float32, hidden_size=64, num_key_value_heads=1, num_hidden_layers=2).to(DEVICE)
    ids, mask, logits = ids.to(DEVICE), mask.to(DEVICE), {}
    for impl in ("eager", "triton"):
        enable(model, rule, impl=impl)
        cache = LRSACache.of(model)
        parts = [prefill(model, ids[:, :30], cache, attention_mask=mask[:, :30]), prefill(model, ids[:, 30:33], cache)]
        decoder = Decoder(model, cache)
        parts += [decoder.step(ids[:, at, None]).clone() for at in range(33, 46)]
        logits[impl] = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits["triton"], logits["eager"], rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("pads", [0, 11], ids=["equal", "unequal"])
@pytest.mark.parametrize("change", ["reset", "reorder", "select"])
def test_new_memory_is_noticed(change, pads, tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    cache = LRSACache.of(model)
    decoder = Decoder(model, cache)
    prefill(model, ids[:, :40], cache, attention_mask=mask[:, :40])
    for at in range(40, 45):
        decoder.note_order()
        decoder.step(ids[:, at, None])
        assert decoder.ready(3)
    if change == "reset":
        cache.reset()
        prefill(model, ids[:, :45], cache, attention_mask=mask[:, :45])
    else:
        order = torch.tensor([1, 2, 0] if change == "reorder" else [1])
        cache.reorder_cache(order)
        ids, mask = ids[order], mask[order]
    assert not decoder.ready(len(ids))
    decoder.note_order()
    assert decoder.ready(len(ids))
    logits = [decoder.step(ids[:, at, None]).clone() for at in range(45, 60)]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, 45:]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_a_beam_search_is_not_served(padding, tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0 if padding else 1
    options = {"do_sample": False, "max_new_tokens": 15, "attention_mask": mask, "pad_token_id": 0, "num_beams": 2}
    plain = model.generate(ids, past_key_values=LRSACache.of(model), **options)
    decoder = Decoder(model, LRSACache.of(model))
    steps = counting(decoder)
    with serving(model, decoder):
        assert model.generate(ids, past_key_values=decoder.cache, **options).equal(plain)
    assert not steps


@pytest.mark.parametrize("pads", [0, 11], ids=["equal", "unequal"])
def test_a_beam_search_does_not_keep_the_rows_it_leaves(pads, tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(3, 41)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    decoder = Decoder(model, LRSACache.of(model))
    with serving(model, decoder), torch.no_grad():
        model(input_ids=ids[:, :40], attention_mask=mask[:, :40], past_key_values=decoder.cache)
        decoder.cache.reorder_cache(torch.tensor([2, 0, 1]))
        model(input_ids=ids[:, 40:], attention_mask=mask, past_key_values=decoder.cache)
        left = [weakref.ref(stream) for layer in decoder.cache.layers[1:] for stream in layer.streams]
        decoder.cache.reorder_cache(torch.tensor([0, 0, 1]))
        assert not any(stream() for stream in left)


LENGTHS = [40, 3, 21, 33]


def left_padded(tokens, lengths=LENGTHS, columns=40):
    """Rows of unequal lengths and their mask (B, columns)."""
    ids, mask = torch.full((len(lengths), columns), 33), torch.zeros(len(lengths), columns, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, columns - length :] = tokens(1, length, seed=length)[0]
        mask[row, columns - length :] = 1
    return ids, mask


def preparations(decoder):
    """Count how often a decoder makes its memory anew."""
    made, prepare = [], decoder._prepare
    decoder._prepare = lambda *given: (made.append(1), prepare(*given))[1]
    return made


@pytest.mark.parametrize("change", [{}, {"dense_layers": (1,)}, {"lag_size": 16}], ids=["rule", "dense", "long-lag"])
@pytest.mark.parametrize("lengths", [[40, 40], LENGTHS], ids=["equal", "unequal"])
def test_memory_for_the_room_is_there_at_once(lengths, change, tiny, tokens, rule):
    model, (ids, mask) = enable(tiny("Llama"), rule.replace(**change)), left_padded(tokens, lengths)
    cache = LRSACache.of(model)
    decoder = Decoder(model, cache, room=30)
    made = preparations(decoder)
    prefill(model, ids, cache, attention_mask=mask)
    for at in range(30):
        decoder.step(ids[:, at, None])
    assert len(made) == 1


@pytest.mark.parametrize("room", [5, 256])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unequal_rows_get_what_each_gets_alone(change, room, tiny, tokens, rule):
    config, (ids, mask), more = rule.replace(**change), left_padded(tokens), tokens(4, 110, seed=1)
    model = enable(tiny("Llama"), config)
    cache = LRSACache.of(model)
    decoder, columns = Decoder(model, cache, room=room), torch.cat([ids, more], dim=1)
    made, mask = preparations(decoder), torch.cat([mask, torch.ones_like(more)], dim=1)
    parts = [prefill(model, ids, cache, attention_mask=mask[:, :40])]

    def step_to(stop):
        for at in range(cache.get_seq_length(), stop):
            parts.append(decoder.step(columns[:, at, None]).clone())
            seen = [length + at - 39 for length in LENGTHS]
            sparse = sum(stored_size(length, config.rule) for length in seen)
            assert cache.stored_tokens() == [sparse, sum(seen) if config.dense_layers else sparse, sparse]

    def call_to(stop):
        start = cache.get_seq_length()
        with torch.no_grad():
            parts.append(model(columns[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)

    # Ordinary calls of one token and of many come between, after which the steps go on.
    step_to(70)
    call_to(71)
    step_to(90)
    call_to(115)
    step_to(150)
    logits = torch.cat(parts, dim=1)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            alone = model(columns[row, None, 40 - length :], use_cache=False).logits[:, -111:]
        torch.testing.assert_close(logits[row, None], alone, rtol=0, atol=1e-5)
    # New memory where the call of many outgrew a row's part of it, and whenever the room was used up.
    assert len(made) >= 4 if room == 5 else len(made) == 1


def test_unequal_rows_share_a_memory_and_its_compressions_stay_there(tiny, tokens, rule):
    (ids, mask), more = left_padded(tokens), tokens(4, 60, seed=1)
    model = enable(tiny("Llama"), rule)
    cache = LRSACache.of(model)
    decoder = Decoder(model, cache)
    made, compressed = preparations(decoder), []
    prefill(model, ids, cache, attention_mask=mask)
    for at in range(60):
        decoder.step(more[:, at, None])
        for layer, slot in zip(cache.layers, decoder.layers, strict=True):
            assert slot.key.shape[:2] == (4, 2)
            assert [stream.buffer.address for stream in layer.streams] == [row.data_ptr() for row in slot.key]
        compressed.append([stream.partitions for stream in cache.layers[0].streams])
    assert len(made) == 1
    changes = [[after > before for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(compressed)]
    assert any(any(rows) and not all(rows) for rows in changes), "rows that compress together prove nothing"
    assert all(sum(rows) >= 4 for rows in zip(*changes, strict=True))


@pytest.mark.parametrize(
    "lengths", [[40], [40] * 3, LENGTHS, [40, 0, 12]], ids=["one", "equal", "unequal", "pads-alone"]
)
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_generate_is_served_but_for_its_prompt(family, lengths, tiny, tokens, rule):
    model, (ids, mask) = enable(tiny(family), rule), left_padded(tokens, lengths)
    options = {"do_sample": False, "min_new_tokens": 40, "max_new_tokens": 40, "attention_mask": mask}
    given = {"output_logits": True, "return_dict_in_generate": True, **options}
    plain = model.generate(ids, past_key_values=LRSACache.of(model), **given)
    decoder = Decoder(model, LRSACache.of(model), room=16)
    steps = counting(decoder)
    with serving(model, decoder):
        served = model.generate(ids, past_key_values=decoder.cache, **given)
    assert served.sequences.equal(plain.sequences)
    torch.testing.assert_close(torch.stack(served.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)
    # A row of pads alone begins with the first token.
    assert len(steps) == 39 - (0 in lengths)


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 64}
ROPES = {
    "yarn": ("Llama", {"factor": 2.0}, False),
    "dynamic": ("Llama", {"factor": 2.0}, True),
    "longrope": ("Phi3", LONGROPE, True),
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_follow_the_length_are_known_and_followed(kind, tiny, tokens, rule):
    family, numbers, waits = ROPES[kind]
    rope = {"rope_type": kind, "rope_theta": 1e4, **numbers}
    model, (ids, mask) = tiny(family, rope_parameters=rope, max_position_embeddings=64), left_padded(tokens)
    # Past 64 tokens the frequencies of the two others are new ones.
    options = {"do_sample": False, "min_new_tokens": 40, "max_new_tokens": 40, "attention_mask": mask}
    given = {"output_logits": True, "return_dict_in_generate": True, **options}
    assert _waits_for_lengths(enable(model, rule)) == waits
    plain = model.generate(ids, past_key_values=LRSACache.of(model), **given)
    decoder = Decoder(model, LRSACache.of(model))
    with serving(model, decoder):
        served = model.generate(ids, past_key_values=decoder.cache, **given)
    torch.testing.assert_close(torch.stack(served.logits), torch.stack(plain.logits), rtol=0, atol=1e-5)


def test_a_row_without_a_token_is_not_served(tiny, tokens, rule):
    model, (ids, mask) = enable(tiny("Llama"), rule), left_padded(tokens, [40, 0])
    cache = LRSACache.of(model)
    decoder, ready = Decoder(model, cache), []
    prefill(model, ids[:, :30], cache, attention_mask=mask[:, :30])
    mask[1, 35:] = 1
    for at in range(30, 38):
        decoder.note_order()
        ready.append(decoder.ready(2))
        with torch.no_grad():
            model(input_ids=ids[:, at, None], attention_mask=mask[:, : at + 1], past_key_values=cache)
    assert ready == [at > 35 for at in range(30, 38)]


def test_positions_that_are_given_hold(tiny, tokens, rule):
    model, ids, logits = enable(tiny("Llama"), rule), tokens(2, 50), []
    positions = torch.arange(50) + torch.tensor([[0], [5]])
    for served in (False, True):
        cache = LRSACache.of(model)
        decoder = Decoder(model, cache)
        steps = counting(decoder)
        with serving(model, decoder) if served else contextlib.nullcontext(), torch.no_grad():
            for start, stop in ((0, 40), (40, 41), *((at, at + 1) for at in range(41, 50))):
                part = slice(start, stop)
                call = {"input_ids": ids[:, part], "position_ids": positions[:, part], "past_key_values": cache}
                output = model(**call).logits[:, -1:].clone()
        logits.append(output)
    assert len(steps) == 10
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_another_batch_is_refused_in_the_block_too(tiny, tokens, rule):
    model, (ids, mask) = enable(tiny("Llama"), rule), left_padded(tokens)
    decoder = Decoder(model, LRSACache.of(model))
    with serving(model, decoder):
        prefill(model, ids, decoder.cache, attention_mask=mask)
        for _ in range(3):
            model(input_ids=ids[:, :1], past_key_values=decoder.cache)
        with refused("cache", reason="4 rows"):
            model(input_ids=ids[:1, :1], past_key_values=decoder.cache)


def test_another_rule_is_refused_in_the_block_too(tiny, tokens, rule):
    model, ids = enable(tiny("Llama"), rule), tokens(1, 50)
    decoder = Decoder(model, LRSACache.of(model))
    with serving(model, decoder):
        for at in (40, 41, 42):
            model(input_ids=ids[:, :40] if at == 40 else ids[:, at - 1, None], past_key_values=decoder.cache)
        with using(model, rule.replace(top_k=1)), refused("past_key_values", reason="3 layers"):
            model(input_ids=ids[:, 42, None], past_key_values=decoder.cache)
    assert "forward" not in vars(model)


def test_without_a_graph_to_replay_nothing_changes(tiny, rule):
    model = enable(tiny("Llama"), rule)
    with graphed_decoding(model, LRSACache.of(model)):
        assert model.forward.__func__ is type(model).forward


def test_a_plain_model_is_refused(tiny, rule):
    model = tiny("Llama")
    with refused("model, cache"), graphed_decoding(model, LRSACache.of(model, rule)):
        pass


@pytest.mark.parametrize("padding", [False, True], ids=["equal", "unequal"])
def test_nothing_outlives_the_block(padding, tiny, tokens, rule):
    model, (ids, mask) = enable(tiny("Llama"), rule), left_padded(tokens)
    options = {"attention_mask": mask if padding else torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10}

    def served():
        decoder = Decoder(model, LRSACache.of(model))
        with serving(model, decoder):
            model.generate(ids, past_key_values=decoder.cache, min_new_tokens=10, **options)
        return [weakref.ref(decoder), weakref.ref(decoder.cache), weakref.ref(decoder.layers[0].key)]

    # Memory of a device is scarce before Python thinks of collecting anything.
    gc.collect()
    gc.disable()
    try:
        assert [held() for held in served()] == [None] * 3
    finally:
        gc.enable()
