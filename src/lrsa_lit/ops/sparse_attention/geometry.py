"""Where partitions lie and which of them a query sees compressed: integer arithmetic only.

Symbols as in README.md: S sink_size, L lag_size, C chunk, t position in its sequence, P(t) partitions compressed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.rule import Rule
from lrsa_lit.ops.sparse_attention.rule_arithmetic import first_position, partitions_at, sinks_and

Integers = TypeVar("Integers", int, Tensor)
"""One integer, or a tensor of them."""


class Span(NamedTuple):
    """Consecutive queries [start, stop) that see the same number of compressed partitions."""

    start: int
    stop: int
    partitions: int


def checked_boundaries(values: Sequence[int], length: int, name: str = "cu_seqlens") -> Sequence[int]:
    """Boundaries 0 … ``length`` of packed sequences, without empty sequences; a UserError if they are invalid."""
    ends = itertools.pairwise(values)
    if len(values) < 2 or values[0] != 0 or values[-1] != length or any(stop < start for start, stop in ends):
        raise UserError(name, values, f"integers from 0 to T = {length} that never decrease")
    return sorted(set(values))


def compressed_at(position: Integers, rule: Rule) -> Integers:
    """P(t), the number of compressed partitions when the token at ``position`` attends; 0 for a negative position."""
    result: Integers = partitions_at(position, rule.sink_size, rule.lag_size, rule.chunk)
    return result


def partition_counts(boundaries: Sequence[int], rule: Rule) -> list[int]:
    """The number of compressed partitions at the end of each sequence [boundaries[n], boundaries[n+1])."""
    return [compressed_at(stop - start - 1, rule) for start, stop in itertools.pairwise(boundaries)]


def raw_start(partitions: Integers, rule: Rule) -> Integers:
    """The first position that is visible uncompressed: S + P L, after the compressed partitions, or 0 if P = 0."""
    result: Integers = sinks_and(partitions, rule.sink_size, rule.lag_size)
    return result


def compact_size(partitions: int, rule: Rule) -> int:
    """The number of keys before the raw range: S + K P, or 0 if P = 0."""
    result: int = sinks_and(partitions, rule.sink_size, rule.top_k)
    return result


def stored_size(length: int, rule: Rule) -> int:
    """Keys per head, compact and raw, that the last of ``length`` tokens attends to."""
    partitions = compressed_at(length - 1, rule)
    return compact_size(partitions, rule) + length - raw_start(partitions, rule)


def window_start(partition: int, rule: Rule) -> int:
    """First position of a partition's window: its last w tokens, whose queries the compressor needs."""
    return rule.sink_size + (partition + 1) * rule.lag_size - rule.compressor.window


def stored_queries(length: int, rule: Rule) -> int:
    """Queries per head that must be stored after ``length`` tokens, because a later compression needs them."""
    first, window = window_start(compressed_at(length - 1, rule) + 1, rule), rule.compressor.window
    return sum(min(window, length - at) for at in range(first, length, rule.lag_size))


def most_window_rows(rule: Rule) -> int:
    """The most queries per head that are stored between two calls for later compressions.

    They belong to the windows of partitions P(t) + 1 and later: older partitions have already served as references.
    """
    chunks, rest = divmod(rule.chunk, rule.lag_size)
    straddles = rest > 0 and rule.lag_size % rule.chunk > 0
    return rule.compressor.window * (chunks + (rest > 0) + straddles)


def spans(start: int, stop: int, rule: Rule) -> Iterator[Span]:
    """Split the queries [start, stop) into spans with the same P(t)."""
    while start < stop:
        partitions = compressed_at(start, rule)
        end = min(stop, first_position(partitions + 1, rule.sink_size, rule.lag_size, rule.chunk))
        yield Span(start, end, partitions)
        start = end


def attended_pairs(length: int, rule: Rule | None) -> int:
    """Query-key pairs of one head over a sequence; ``None`` counts dense causal attention."""
    if rule is None:
        return length * (length + 1) // 2
    total = 0
    for span in spans(0, length, rule):
        count = span.stop - span.start
        before = compact_size(span.partitions, rule) + span.start - raw_start(span.partitions, rule)
        total += count * before + count * (count + 1) // 2
    return total
