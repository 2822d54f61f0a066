"""The operator over several calls: any split gives the parallel pass, and only what the rule keeps is held."""

import itertools

import pytest
import torch
from helpers import random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsa_lit.ops.sparse_attention import (
    LagRelative,
    MeanPool,
    QueryAttention,
    RandomTokens,
    Recency,
    Rule,
    most_window_rows,
    sparse_attention,
)
from lrsa_lit.ops.sparse_attention.buffer import PairBuffer
from lrsa_lit.ops.sparse_attention.geometry import compressed_at, raw_start, stored_size
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream, advance_together

SCALE = 0.4
RULE = Rule(sink_size=3, lag_size=8, top_k=3)


def run(config, tensors, sizes):
    """Outputs of the calls joined, and the stream; what is stored is checked after each call."""
    stream, outputs, start = KeyValueStream(config), [], 0
    for size in sizes:
        outputs.append(stream.attend(*(tensor[:, :, start : start + size] for tensor in tensors), SCALE))
        start += size
        assert stream.seen == start
        stored = start if config is None else stored_size(start, config)
        assert [pair.shape[2] for pair in stream.stored] == [stored, stored]
    return torch.cat(outputs, dim=2), stream


@st.composite
def splits(draw):
    lag = draw(st.integers(2, 8))
    config = Rule(
        sink_size=draw(st.integers(0, 5)),
        lag_size=lag,
        top_k=draw(st.integers(0, lag)),
        chunk_size=draw(st.one_of(st.none(), st.integers(1, 2 * lag + 1))),
        compressor=draw(
            st.sampled_from([RULE.compressor, RandomTokens(2), Recency(), MeanPool(), QueryAttention(window=2)])
        ),
    )
    return config, draw(st.lists(st.integers(1, 25), min_size=1, max_size=12))


@settings(max_examples=200)
@given(splits())
def test_any_split_gives_the_parallel_pass(case):
    config, sizes = case
    tensors = random_qkv(sum(sizes), batch=2)
    output, _ = run(config, tensors, sizes)
    torch.testing.assert_close(output, sparse_attention(*tensors, config, scale=SCALE), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [[100], [7] * 14 + [2], [8] * 12 + [4], [1] * 100, [19, 1, 80], [18, 2, 80]], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 12, 16, 5])
def test_splits_that_end_on_and_around_the_chunks(chunk, sizes):
    config, tensors = RULE.replace(chunk_size=chunk), random_qkv(100)
    output, _ = run(config, tensors, sizes)
    torch.testing.assert_close(output, sparse_attention(*tensors, config, scale=SCALE))


@pytest.mark.parametrize("sizes", [[1] * 100, [7] * 14, [19, 1, 80]], ids=["ones", "sevens", "several"])
@pytest.mark.parametrize("chunk", [None, 4, 5, 12, 16])
def test_of_queries_the_windows_of_references_to_come_are_held(chunk, sizes):
    rule = RULE.replace(chunk_size=chunk, compressor=QueryAttention(window=3))
    tensors, stream, most = random_qkv(100, batch=2), KeyValueStream(rule), 0
    for size in sizes:
        stream.attend(*(x[:, :, stream.seen : stream.seen + size] for x in tensors), SCALE)
        reference = 3 + 8 * (stream.partitions + 1)
        needed = [t for t in range(reference, stream.seen) if (t - 3) % 8 >= 5]
        for held in (stream, stream.rows(torch.tensor([0, 1]))):
            pairs, queries = held.buffers
            assert queries.filled[0].equal(tensors[0][:, :, needed])
            stored = stored_size(stream.seen, rule) if not stream.due else pairs.length
            assert held.nbytes == 8 * 5 * 2 * (2 * 2 * stored + 4 * len(needed))
        most = max(most, len(needed))
    assert most <= most_window_rows(rule)
    assert most_window_rows(rule) == {None: 3, 4: 3, 5: 6, 12: 9, 16: 6}[chunk]


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 1, 2]], ids=["query", "key", "value", "all"])
@pytest.mark.parametrize("sizes", [[60], [1] * 60, [20, 1, 30, 9]], ids=["once", "ones", "several"])
def test_gradients_pass_through_the_calls(sizes, wanted):
    tensors = random_qkv(60)
    leaves = [tensors[index].requires_grad_() for index in wanted]
    ours, _ = run(RULE, tensors, sizes)
    theirs = sparse_attention(*tensors, RULE, scale=SCALE)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), leaves) for output in (ours, theirs)))


@pytest.mark.parametrize("modes", itertools.permutations([torch.no_grad, torch.inference_mode, torch.enable_grad]))
def test_calls_may_change_between_the_modes_of_torch(modes):
    tensors, stream, outputs = random_qkv(120), KeyValueStream(RULE), []
    for position in range(120):
        with modes[position // 3 % 3]():
            outputs.append(stream.attend(*(tensor[:, :, position, None] for tensor in tensors), SCALE).clone())
    torch.testing.assert_close(torch.cat(outputs, dim=2), sparse_attention(*tensors, RULE, scale=SCALE))


def test_rows_that_were_cut_off_outlive_those_that_take_their_place():
    rows, others = random_qkv(9)[1:], random_qkv(9, seed=1)[1:]
    buffer = PairBuffer(*rows)
    with torch.no_grad():
        rest = buffer.cut(4)
        buffer.append(tuple(tensor[:, :, :5] for tensor in others))
    for kept, tensor in zip(rest, rows, strict=True):
        assert kept.equal(tensor[:, :, 4:])


def held_bytes(stream) -> int:
    """Memory behind the tensors of the stream: whole storages, whatever views show of them."""
    return sum(tensor.untyped_storage().nbytes() for tensor in stream.buffer.whole)


@pytest.mark.parametrize(
    "sizes", [[200], [150, 50], [1] * 200, [30] * 6 + [20]], ids=["once", "two", "ones", "thirties"]
)
@pytest.mark.parametrize("config", [RULE, RULE.replace(top_k=0, sink_size=0), None], ids=["rule", "window", "dense"])
def test_the_memory_of_dropped_tokens_is_freed(config, sizes):
    tensors = random_qkv(200, batch=1, heads=2, dim=5)
    _, stream = run(config, tensors, sizes)
    most = max(200 if config is None else stored_size(length, config) for length in range(1, 201))
    for held in (stream, stream.rows(torch.tensor([0]))):
        assert held_bytes(held) <= 2 * most * 33 / 32 * 2 * 5 * 8


def test_memory_is_allocated_for_many_tokens_at_a_time():
    tensors, addresses = random_qkv(2000, batch=1), []
    stream = KeyValueStream(RULE)
    with torch.no_grad():
        for position in range(2000):
            stream.attend(*(tensor[:, :, position, None] for tensor in tensors), SCALE)
            addresses.append(stream.buffer.whole[0].data_ptr())
    moves = sum(first != second for first, second in itertools.pairwise(addresses[1000:]))
    assert moves <= 32, "a thousand tokens keep 375 rows: at 1/32 spare that is about 25 moves"


def test_streams_of_unequal_lengths_go_on_in_one_memory_and_leave_it_when_it_is_full():
    lengths, outputs = [70, 31, 9], []
    tensors = [random_qkv(length + 60, batch=1, seed=length) for length in lengths]
    streams = [run(RULE, [part[:, :, :length] for part in parts], [length])[1]
               for parts, length in zip(tensors, lengths, strict=True)]  # fmt: skip
    key, value = (part.new_empty(3, 2, 48, 5) for part in streams[0].buffer.whole)
    for row, stream in enumerate(streams):
        stream.buffer.move_to((key[row : row + 1], value[row : row + 1]))
    addresses = [part.data_ptr() for part in key]
    assert [stream.buffer.address for stream in streams] == addresses
    with torch.no_grad():
        for row, (stream, parts) in enumerate(zip(streams, tensors, strict=True)):
            later = [part[:, :, lengths[row] :] for part in parts]
            outputs.append([stream.attend(*(part[:, :, at, None] for part in later), SCALE) for at in range(60)])
    for row, (stream, parts) in enumerate(zip(streams, tensors, strict=True)):
        whole = sparse_attention(*parts, RULE, scale=SCALE)
        torch.testing.assert_close(torch.cat(outputs[row], dim=2), whole[:, :, lengths[row] :])
        stayed = max(stored_size(length, RULE) for length in range(lengths[row], lengths[row] + 61)) <= 48
        assert (stream.buffer.address == addresses[row]) == stayed
        assert stayed == (row > 0)


def test_the_first_calls_hold_no_more_than_their_tokens():
    _, stream = run(RULE, random_qkv(12), [5, 7])
    assert held_bytes(stream) == 2 * 12 * 2 * 5 * 8


def test_stored_pairs_are_sinks_then_kept_then_raw():
    config = RULE.replace(compressor=Recency())
    tensors = random_qkv(45)
    _, stream = run(config, tensors, [45])
    count = compressed_at(44, config)
    assert count == 4
    kept = [3 + 8 * p + place for p in range(count) for place in (5, 6, 7)]
    positions = [0, 1, 2, *kept, *range(raw_start(count, config), 45)]
    for held, tensor in zip(stream.stored, tensors[1:], strict=True):
        assert held.equal(tensor[:, :, positions])


def test_an_empty_stream_stores_nothing():
    stream = KeyValueStream(RULE)
    assert stream.stored is None
    assert stream.seen == 0
    assert stream.rows(torch.tensor([0])).stored is None


def test_a_dense_stream_is_causal_attention():
    tensors = random_qkv(60)
    output, _ = run(None, tensors, [25, 1, 34])
    dense = RULE.replace(top_k=RULE.lag_size)
    torch.testing.assert_close(output, sparse_attention(*tensors, dense, scale=SCALE))


@pytest.mark.parametrize("indices", [[2, 0, 0], [1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("seen", [10, 50], ids=["before-compression", "after"])
def test_rows_continue_as_the_rows_they_were_taken_from(indices, seen):
    tensors = random_qkv(70, batch=3)
    _, stream = run(RULE, [tensor[:, :, :seen] for tensor in tensors], [seen])
    chosen = stream.rows(torch.tensor(indices))
    assert chosen.seen == seen
    later = chosen.attend(*(tensor[indices, :, seen:] for tensor in tensors), SCALE)
    whole = sparse_attention(*tensors, RULE, scale=SCALE)
    torch.testing.assert_close(later, whole[indices, :, seen:])
    assert stream.stored[0].shape[2] == stored_size(seen, RULE), "the stream itself is left alone"


@torch.no_grad()
@pytest.mark.parametrize(
    "compressor",
    [LagRelative(), RandomTokens(), QueryAttention(window=3), MeanPool()],
    ids=lambda each: type(each).__name__,
)
def test_streams_advance_together_as_each_does_alone(compressor, monkeypatch):
    rule, calls = Rule(sink_size=2, lag_size=8, top_k=3, compressor=compressor), []
    compress = KeyValueStream._compact
    monkeypatch.setattr(KeyValueStream, "_compact", lambda *given: (calls.append(given), compress(*given))[1])
    alone, together = ([KeyValueStream(rule) for _ in range(4)] for _ in range(2))
    for token in range(60):
        if token and together[0].due:
            before = len(calls)
            advance_together(together)
            assert len(calls) == before + 1
        for number, (one, another) in enumerate(zip(alone, together, strict=True)):
            given = random_qkv(1, seed=4 * token + number)
            assert torch.equal(one.attend(*given, SCALE), another.attend(*given, SCALE)), token
    assert together[0].partitions == compressed_at(59, rule) > 3
