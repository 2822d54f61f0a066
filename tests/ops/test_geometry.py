"""The integer arithmetic of partitions, spans and counts, against loops over the queries."""

import itertools

import pytest
import torch
from helpers import partitions_compressed
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.ops.sparse_attention import Rule
from lrsa_lit.ops.sparse_attention import geometry as geo


@st.composite
def rules(draw):
    lag = draw(st.integers(2, 9))
    chunk = draw(st.one_of(st.none(), st.integers(1, 3 * lag)))
    return Rule(draw(st.integers(0, 6)), lag, draw(st.integers(0, lag)), chunk)


def visible(t: int, rule: Rule) -> int:
    """Keys that the query at t sees, counted as the definition states them."""
    count = partitions_compressed(t, rule)
    if count == 0:
        return t + 1
    return rule.sink_size + rule.top_k * count + (t + 1 - rule.sink_size - count * rule.lag_size)


@given(rules(), st.integers(0, 90))
def test_counts_are_those_of_a_loop_over_the_queries(rule, length):
    seen = [visible(t, rule) for t in range(length)]
    assert geo.attended_pairs(length, rule) == sum(seen)
    assert [geo.stored_size(t + 1, rule) for t in range(length)] == seen
    assert [geo.compressed_at(t, rule) for t in range(length)] == [
        partitions_compressed(t, rule) for t in range(length)
    ]


@given(rules(), st.integers(0, 60), st.integers(0, 60))
def test_spans_tile_the_queries_and_share_their_partitions(rule, start, count):
    spans = list(geo.spans(start, start + count, rule))
    assert [t for span in spans for t in range(span.start, span.stop)] == list(range(start, start + count))
    for span in spans:
        assert {partitions_compressed(t, rule) for t in range(span.start, span.stop)} == {span.partitions}
    assert all(a.partitions < b.partitions for a, b in itertools.pairwise(spans)), "spans that could be one"


@given(rules(), st.integers(0, 90))
def test_a_partition_is_compressed_only_when_its_reference_lies_before_the_chunk(rule, t):
    end_of_reference = rule.sink_size + (geo.compressed_at(t, rule) + 1) * rule.lag_size
    if geo.compressed_at(t, rule):
        first, chunk = rule.first_compression, rule.chunk
        assert end_of_reference <= t - (t - first) % chunk <= t


@given(rules())
def test_many_positions_at_once_give_what_each_gives(rule):
    compressed = geo.compressed_at(torch.arange(-3, 90), rule)
    assert compressed.tolist() == [geo.compressed_at(t, rule) for t in range(-3, 90)]
    assert geo.raw_start(compressed, rule).tolist() == [geo.raw_start(count, rule) for count in compressed.tolist()]


@pytest.mark.parametrize("lag", [2, 6, 12, 16])
def test_every_chunk_that_divides_the_lag_is_one_rule(lag):
    default = Rule(3, lag, 1)
    for chunk in (c for c in range(1, lag + 1) if lag % c == 0):
        other = default.replace(chunk_size=chunk)
        assert all(geo.compressed_at(t, other) == geo.compressed_at(t, default) for t in range(10 * lag))


def test_a_chunk_longer_than_the_lag_is_another_rule():
    default = Rule(3, 8, 1)
    longer = default.replace(chunk_size=12)
    assert any(geo.compressed_at(t, longer) != geo.compressed_at(t, default) for t in range(80))


def test_the_first_compression_stands_where_the_second_partition_is_complete():
    rule = Rule(sink_size=3, lag_size=4, top_k=2)
    assert [geo.compressed_at(t, rule) for t in (-1, 0, 10, 11, 14, 15)] == [0, 0, 0, 1, 1, 2]
    assert geo.raw_start(0, rule) == 0
    assert geo.raw_start(1, rule) == 3 + 4
    assert geo.compact_size(0, rule) == 0
    assert geo.compact_size(2, rule) == 3 + 2 * 2


def test_the_raw_range_holds_between_one_and_two_partitions():
    rule = Rule(sink_size=3, lag_size=4, top_k=2)
    raw = [t + 1 - geo.raw_start(geo.compressed_at(t, rule), rule) for t in range(rule.first_compression, 60)]
    assert (min(raw), max(raw)) == (rule.lag_size + 1, 2 * rule.lag_size)


@pytest.mark.parametrize(
    ("lag", "kept", "length", "ratio"),
    [
        (128, 32, 8192, 3.48),
        (128, 32, 32768, 3.85),
        (128, 32, 131072, 3.96),
        (128, 16, 131072, 7.83),
        (1024, 128, 8192, 2.33),
        (1024, 128, 32768, 4.85),
        (1024, 128, 131072, 6.87),
    ],
)
def test_the_attainable_speed_up_is_the_published_ratio_of_pairs(lag, kept, length, ratio):
    rule = Rule(16, lag, kept)
    assert geo.attended_pairs(length, None) == length * (length + 1) // 2
    assert geo.attended_pairs(length, None) / geo.attended_pairs(length, rule) == pytest.approx(ratio, abs=0.005)
