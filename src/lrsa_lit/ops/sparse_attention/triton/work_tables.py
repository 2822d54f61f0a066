"""The integers of a call, and which program works on what: small integer tables on the device, built once per shape.

Tiles are sorted by work, the longest first, so that the last ones to run are short. Tables do not depend on computed
values, so all layers of a model and both passes share them, and no launch waits for the device.

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
from lrsa_lit.ops.to_device import to_device

TAGS = (torch.Tag.cudagraph_unsafe,)
"""Tags of operators that use the tables: these outlive a call, so CUDA graph trees must not recycle their memory."""

TABLES = 1024
"""The number of geometries whose tables are cached. All layers share them, so a layer's calls must fit: rows of unequal
lengths that go one by one, or part by part through a prompt, have several each."""


Firsts = int | tuple[int, ...]
"""A first position that all sequences have, or that of each."""


class Geometry(NamedTuple):
    """The integers of a call: S, L, K, C, and the boundaries 0 … T of packed sequences.

    The given queries and raw tokens of a sequence start at the positions ``queries_from`` and ``keys_from``: one number
    for all sequences, or one for each.
    """

    sink: int
    lag: int
    keep: int
    chunk: int
    boundaries: tuple[int, ...]
    queries_from: Firsts = 0
    keys_from: Firsts = 0

    @classmethod
    def of(cls, rule: Rule, boundaries: Sequence[int], queries_from: Firsts = 0, keys_from: Firsts = 0) -> Geometry:
        """The geometry of a rule, without its compressor."""
        return cls(*rule.numbers, tuple(boundaries), queries_from, keys_from)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """S, L, K, C, in the order of ``Rule.numbers`` and of the kernels' arguments."""
        return self.sink, self.lag, self.keep, self.chunk

    @property
    def rule(self) -> Rule:
        """A rule with these numbers."""
        return Rule(*self.numbers)

    @property
    def first_queries(self) -> tuple[int, ...]:
        """The position of the first given query of each sequence."""
        return _of_each(self.queries_from, len(self.lengths))

    @property
    def first_keys(self) -> tuple[int, ...]:
        """The position of the first given raw token of each sequence."""
        return _of_each(self.keys_from, len(self.lengths))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return [stop - start for start, stop in itertools.pairwise(self.boundaries)]


def _of_each(firsts: Firsts, sequences: int) -> tuple[int, ...]:
    return (firsts,) * sequences if isinstance(firsts, int) else firsts


@functools.lru_cache(maxsize=TABLES)
def partitions(geometry: Geometry) -> tuple[int, ...]:
    """The number of compressed partitions at the end of each sequence."""
    return tuple(partition_counts(geometry.boundaries, geometry.rule))


@functools.lru_cache(maxsize=TABLES)
def compact_rows(geometry: Geometry) -> tuple[int, ...]:
    """The number of rows of each sequence in the compact buffer."""
    return tuple(compact_size(count, geometry.rule) for count in partitions(geometry))


def ranks_shape(key: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """The shape (B, H, P, L) of ranks, for keys (B, H, …)."""
    return *key.shape[:2], sum(partitions(geometry)), geometry.lag


def compact_shape(key: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """The shape (B, H, M, D) of the compact buffer, for keys (B, H, T, D)."""
    return *key.shape[:2], sum(compact_rows(geometry)), key.shape[3]


def _table(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that caches the tables of ``build`` on the device, by geometry and further integers."""
    captured: list[Tensor] = []

    @functools.lru_cache(maxsize=TABLES)
    def cached(geometry: Geometry, device: torch.device, *sizes: int) -> Tensor:
        return to_device(build(geometry, *sizes).to(torch.int32), device)

    def lookup(geometry: Geometry, device: torch.device, *sizes: int) -> Tensor:
        table = cached(geometry, device, *sizes)
        # A captured CUDA graph uses the table's address, so the table must outlive the cache.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            captured.append(table)
        return table

    return lookup


@_table
def sequence_table(geometry: Geometry) -> Tensor:
    """(N, 9): where the parts of each sequence are; device_functions.py names the columns.

    Rows refer to position 0, even if the given tokens start later: the row of position t is row + t.
    """
    rows = []
    query_row = key_row = compact_row = partition_row = 0
    of_sequences = geometry.lengths, geometry.first_queries, geometry.first_keys
    for length, query, key, count, size in zip(
        *of_sequences, partitions(geometry), compact_rows(geometry), strict=True
    ):
        queries, keys = (query_row - query, query, length), (key_row - key, key, length)
        rows.append([*queries, *keys, compact_row, partition_row, count])
        query_row, key_row = query_row + length - query, key_row + length - key
        compact_row, partition_row = compact_row + size, partition_row + count
    return torch.tensor(rows)


@_table
def partition_table(geometry: Geometry) -> Tensor:
    """(P + N, 2): sequence and index of each partition; then, for the sinks of each sequence, index -1."""
    rows = [[index, ordinal] for index, count in enumerate(partitions(geometry)) for ordinal in range(count)]
    return torch.tensor(rows + [[index, -1] for index in range(len(geometry.lengths))])


@_table
def partition_starts(geometry: Geometry) -> Tensor:
    """(P,): the start of each partition in the row."""
    return _starts(geometry)


def _starts(geometry: Geometry) -> Tensor:
    first = [start + geometry.sink for start in geometry.boundaries[:-1]]
    counts = enumerate(partitions(geometry))
    return torch.tensor([first[index] + geometry.lag * ordinal for index, count in counts for ordinal in range(count)])


@_table
def window_rows(geometry: Geometry, window: int) -> Tensor:
    """(P,): the start of the window of each partition's reference among the given queries."""
    (first,) = set(geometry.first_queries)
    return _starts(geometry) + 2 * geometry.lag - window - first


@_table
def query_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first position, the queries that see the most keys first.

    Tiles start at S modulo the block size: if it divides L and C, no tile straddles a compression.
    """
    tiles = _tiles(geometry, block, aligned=True, firsts=geometry.first_queries)
    compressed = compressed_at(tiles[:, 1] + block - 1, geometry.rule)
    compact, raw = compressed * geometry.keep, tiles[:, 1] - compressed * geometry.lag
    return tiles[(compact + raw).argsort(descending=True, stable=True)]


def query_walk(inputs: Inputs, geometry: Geometry, block: int) -> tuple[int, tuple[Tensor, Tensor], tuple[int, ...]]:
    """For kernels over tiles of queries: the number of tiles of all heads; both tables; B Hq, Hq, Hq / H, Tq."""
    batch, heads, queries, _ = inputs.query.shape
    tables = query_tiles(geometry, inputs.query.device, block), sequence_table(geometry, inputs.query.device)
    return tables[0].shape[0] * batch * heads, tables, (batch * heads, heads, heads // inputs.key.shape[1], queries)


@_table
def raw_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first position of tiles of raw keys, which are all seen by about as many queries."""
    return _tiles(geometry, block, aligned=True, firsts=geometry.first_keys)


@_table
def compact_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first column of tiles of the compact buffer; those seen by most queries come first."""
    tiles = _tiles(geometry, block, aligned=False, lengths=compact_rows(geometry))
    lengths = torch.tensor(geometry.lengths)[tiles[:, 0]]
    unseen = (tiles[:, 1] - geometry.sink).clamp(min=0) // max(geometry.keep, 1) * geometry.lag
    return tiles[(lengths - unseen).argsort(descending=True, stable=True)]


def _tiles(
    geometry: Geometry, block: int, *, aligned: bool, firsts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None
) -> Tensor:  # fmt: skip
    pieces, lengths = [], geometry.lengths if lengths is None else lengths
    for index, (first, length) in enumerate(zip(firsts or [0] * len(lengths), lengths, strict=True)):
        start = first - (first - geometry.sink) % block if aligned else first
        starts = torch.arange(start, length, block)
        pieces.append(torch.stack([torch.full_like(starts, index), starts], dim=1))
    return torch.cat(pieces)
