"""The integers of a call: the numbers of its rule, and where its sequences lie."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lrsa_lit.ops.sparse_attention.geometry import compact_size, partition_counts
from lrsa_lit.ops.sparse_attention.rule import Rule

TABLES = 64
"""Of how many geometries what follows from them is kept."""


class Geometry(NamedTuple):
    """Everything about a call that is no tensor. Registered operators take it as a list of integers.

    Attributes:
        sink: S.
        lag: L.
        keep: K.
        chunk: C.
        boundaries: 0 … T, where the packed sequences start and end.
        queries_from: position of the first query; 0 where several sequences are packed.
        keys_from: position of the first raw token that is at hand, likewise.
    """

    sink: int
    lag: int
    keep: int
    chunk: int
    boundaries: tuple[int, ...]
    queries_from: int = 0
    keys_from: int = 0

    @classmethod
    def of(cls, rule: Rule, boundaries: Sequence[int], queries_from: int = 0, keys_from: int = 0) -> Geometry:
        """That of a rule, whose compressor it leaves out."""
        return cls(*rule.numbers, tuple(boundaries), queries_from, keys_from)

    @classmethod
    def from_list(cls, numbers: Sequence[int]) -> Geometry:
        """The way back from :meth:`to_list`."""
        sink, lag, keep, chunk, queries_from, keys_from, *boundaries = numbers
        return cls(sink, lag, keep, chunk, tuple(boundaries), queries_from, keys_from)

    def to_list(self) -> list[int]:
        """S, L, K, C, where queries and keys start, and the boundaries."""
        return [*self.numbers, self.queries_from, self.keys_from, *self.boundaries]

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """S, L, K, C, the order of ``Rule.numbers`` and of the kernels' arguments."""
        return self.sink, self.lag, self.keep, self.chunk

    @property
    def rule(self) -> Rule:
        """A rule with these numbers."""
        return Rule(*self.numbers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [stop - start for start, stop in itertools.pairwise(self.boundaries)]


@functools.lru_cache(maxsize=TABLES)
def partitions(geometry: Geometry) -> tuple[int, ...]:
    """Partitions that each sequence has compressed by its end."""
    return tuple(partition_counts(geometry.boundaries, geometry.rule))


@functools.lru_cache(maxsize=TABLES)
def compact_rows(geometry: Geometry) -> tuple[int, ...]:
    """Rows of the compact buffer that each sequence owns."""
    return tuple(compact_size(count, geometry.rule) for count in partitions(geometry))
