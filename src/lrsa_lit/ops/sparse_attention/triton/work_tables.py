"""The integers of a call, and which program works on what: small integer tables on the device, built once per shape.

Tiles are ordered long first, so that the last ones to run are short. A table depends on nothing that a layer computes:
all layers of a model, and both passes, share one, and no launch waits for the device.

Symbols: S sink_size, L lag_size, K top_k, C chunk, T tokens, N packed sequences, P partitions, M compact rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.geometry import compact_size, compressed_at, partition_counts
from lrsa_lit.ops.sparse_attention.rule import Rule
from lrsa_lit.ops.sparse_attention.triton.host_functions import Inputs

TAGS = (torch.Tag.cudagraph_unsafe,)
"""Of every operator that uses the tables: they outlive a call, in memory that CUDA graph trees must not recycle."""

TABLES = 64
"""Of how many geometries what follows from them is kept."""


class Geometry(NamedTuple):
    """Everything about a call that is no tensor: S, L, K, C, and where the packed sequences start and end, 0 … T.

    Queries and raw tokens that are at hand start at ``queries_from`` and ``keys_from``; 0 where several sequences are
    packed.
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
        """That of a rule, without its compressor."""
        return cls(*rule.numbers, tuple(boundaries), queries_from, keys_from)

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


def ranks_shape(key: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """(B, H, P, L) of the partitions of keys (B, H, …)."""
    return *key.shape[:2], sum(partitions(geometry)), geometry.lag


def compact_shape(key: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """(B, H, M, D) of the compact buffer of keys (B, H, T, D)."""
    return *key.shape[:2], sum(compact_rows(geometry)), key.shape[3]


def _table(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep on the device what ``build`` makes of a geometry and further integers, for the most recent calls."""
    captured: list[Tensor] = []

    @functools.lru_cache(maxsize=TABLES)
    def cached(geometry: Geometry, device: torch.device, *sizes: int) -> Tensor:
        return build(geometry, *sizes).to(torch.int32).to(device)

    def lookup(geometry: Geometry, device: torch.device, *sizes: int) -> Tensor:
        table = cached(geometry, device, *sizes)
        # A CUDA graph remembers the address, so a table that it uses must outlive the cache.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            captured.append(table)
        return table

    return lookup


@_table
def sequence_table(geometry: Geometry) -> Tensor:
    """(N, 9), the columns that device_functions.py names: where the parts of each sequence stand.

    Rows are those of position 0, wherever the first position at hand stands: row of t = row + t.
    """
    rows = []
    compact_row = partition_row = 0
    for start, length, count, size in zip(
        geometry.boundaries, geometry.lengths, partitions(geometry), compact_rows(geometry), strict=False
    ):
        queries = start - geometry.queries_from, geometry.queries_from, length
        keys = start - geometry.keys_from, geometry.keys_from, length
        rows.append([*queries, *keys, compact_row, partition_row, count])
        compact_row, partition_row = compact_row + size, partition_row + count
    return torch.tensor(rows)


@_table
def partition_table(geometry: Geometry) -> Tensor:
    """(P + N, 2): sequence and ordinal of each partition; then, for the sinks of each sequence, ordinal -1."""
    rows = [[index, ordinal] for index, count in enumerate(partitions(geometry)) for ordinal in range(count)]
    return torch.tensor(rows + [[index, -1] for index in range(len(geometry.lengths))])


@_table
def partition_starts(geometry: Geometry) -> Tensor:
    """(P,): where in the row each partition starts."""
    return _starts(geometry)


def _starts(geometry: Geometry) -> Tensor:
    first = [start + geometry.sink for start in geometry.boundaries[:-1]]
    counts = enumerate(partitions(geometry))
    return torch.tensor([first[index] + geometry.lag * ordinal for index, count in counts for ordinal in range(count)])


@_table
def window_rows(geometry: Geometry, window: int) -> Tensor:
    """(P,): where, in the queries at hand, the windows of the partitions' references start."""
    return _starts(geometry) + 2 * geometry.lag - window - geometry.queries_from


@_table
def query_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first position, the queries that see the most keys first.

    Tiles start at S modulo the block size: if it divides L and C, no tile straddles a compression.
    """
    tiles = _tiles(geometry, block, aligned=True, first=geometry.queries_from)
    compressed = compressed_at(tiles[:, 1] + block - 1, geometry.rule)
    compact, raw = compressed * geometry.keep, tiles[:, 1] - compressed * geometry.lag
    return tiles[(compact + raw).argsort(descending=True, stable=True)]


def query_walk(inputs: Inputs, geometry: Geometry, block: int) -> tuple[int, tuple[Tensor, Tensor], tuple[int, ...]]:
    """For kernels that walk tiles of queries: how many there are, of all heads; both tables; B Hq, Hq, Hq / H, Tq."""
    batch, heads, queries, _ = inputs.query.shape
    tables = query_tiles(geometry, inputs.query.device, block), sequence_table(geometry, inputs.query.device)
    return len(tables[0]) * batch * heads, tables, (batch * heads, heads, heads // inputs.key.shape[1], queries)


@_table
def raw_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first position of tiles of raw keys; each is seen by about as many queries."""
    return _tiles(geometry, block, aligned=True, first=geometry.keys_from)


@_table
def compact_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first column of tiles of the compact buffer, the most seen first."""
    tiles = _tiles(geometry, block, aligned=False, lengths=compact_rows(geometry))
    lengths = torch.tensor(geometry.lengths)[tiles[:, 0]]
    unseen = (tiles[:, 1] - geometry.sink).clamp(min=0) // max(geometry.keep, 1) * geometry.lag
    return tiles[(lengths - unseen).argsort(descending=True, stable=True)]


def _tiles(
    geometry: Geometry, block: int, *, aligned: bool, first: int = 0, lengths: Sequence[int] | None = None
) -> Tensor:
    pieces = []
    for index, length in enumerate(geometry.lengths if lengths is None else lengths):
        start = first - (first - geometry.sink) % block if aligned else first
        starts = torch.arange(start, length, block)
        pieces.append(torch.stack([torch.full_like(starts, index), starts], dim=1))
    return torch.cat(pieces)
