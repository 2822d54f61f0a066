"""Where partitions lie and which of them a query sees compressed: integer arithmetic only.

Symbols as in README.md: S sink_size, L lag_size, C chunk, t position in its sequence, P(t) partitions compressed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from lrsa_lit.ops.sparse_attention.config import LRSAConfig


class Span(NamedTuple):
    """Consecutive queries [start, stop) that see the same number of compressed partitions."""

    start: int
    stop: int
    partitions: int


def checked_boundaries(values: Sequence[int], length: int, name: str = "cu_seqlens") -> Sequence[int]:
    """Boundaries 0 … ``length`` of packed sequences without the empty ones.

    Raises:
        UserError: they are none; it says what they are called.
    """
    ends = itertools.pairwise(values)
    if len(values) < 2 or values[0] != 0 or values[-1] != length or any(stop < start for start, stop in ends):
        raise UserError(name, values, f"integers from 0 to T = {length} that never decrease")
    return sorted(set(values))


def chunk_start(position: int, config: LRSAConfig) -> int:
    """b(t), the start of the chunk in which the token at ``position`` is processed."""
    first = config.first_compression
    if position < first:
        return 0
    return first + (position - first) // config.chunk * config.chunk


def compressed_at(position: int, config: LRSAConfig) -> int:
    """P(t), the partitions that are compressed when the token at ``position`` attends; 0 for a negative position."""
    start = chunk_start(position, config)
    if start < config.first_compression:
        return 0
    return (start - config.sink_size) // config.lag_size - 1


def raw_start(partitions: int, config: LRSAConfig) -> int:
    """First position that is visible uncompressed: 0, or S + P L behind the compressed partitions."""
    return config.sink_size + partitions * config.lag_size if partitions else 0


def compact_size(partitions: int, config: LRSAConfig) -> int:
    """Keys in front of the raw range: 0, or S + K P."""
    return config.sink_size + partitions * config.top_k if partitions else 0


def stored_size(length: int, config: LRSAConfig) -> int:
    """Keys per head that a query at the end of ``length`` tokens needs: compact ones and the raw range."""
    partitions = compressed_at(length - 1, config)
    return compact_size(partitions, config) + length - raw_start(partitions, config)


def spans(start: int, stop: int, config: LRSAConfig) -> Iterator[Span]:
    """Cut the queries [start, stop) where P(t) changes."""
    while start < stop:
        partitions = compressed_at(start, config)
        end = min(stop, _next_change(start, partitions, config))
        yield Span(start, end, partitions)
        start = end


def attended_pairs(length: int, config: LRSAConfig | None) -> int:
    """Query-key pairs of one head over a sequence; ``None`` counts dense causal attention."""
    if config is None:
        return length * (length + 1) // 2
    total = 0
    for span in spans(0, length, config):
        count = span.stop - span.start
        before = compact_size(span.partitions, config) + span.start - raw_start(span.partitions, config)
        total += count * before + count * (count + 1) // 2
    return total


def _next_change(position: int, partitions: int, config: LRSAConfig) -> int:
    """First position after ``position`` at which P(t) is larger."""
    first = config.first_compression
    if position < first:
        return first
    # P grows at the first chunk start b with (b - S) // L - 1 > P, that is b >= S + (P + 2) L.
    needed = config.sink_size + (partitions + 2) * config.lag_size
    return first + -(-(needed - first) // config.chunk) * config.chunk
