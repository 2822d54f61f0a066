"""Which program works on what: small integer tables on the device, built on the host from integers, once per shape.

Tiles are ordered long first, so that the last ones to run are short. A table depends on nothing that a layer computes:
all layers of a model, and both passes, share one, and no launch waits for the device.

Symbols: S sink_size, L lag_size, K top_k, C chunk, T tokens, N packed sequences, P partitions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.geometry import compressed_at
from lrsa_lit.ops.sparse_attention.triton.call_geometry import TABLES, Geometry, compact_rows, partitions

TAGS = (torch.Tag.cudagraph_unsafe,)
"""Of every operator that uses the tables: they outlive a call, in memory that CUDA graph trees must not recycle."""


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
def query_tiles(geometry: Geometry, block: int) -> Tensor:
    """(tiles, 2): sequence and first position, the queries that see the most keys first.

    Tiles start at S modulo the block size: if it divides L and C, no tile straddles a compression.
    """
    tiles = _tiles(geometry, block, aligned=True, first=geometry.queries_from)
    compressed = compressed_at(tiles[:, 1] + block - 1, geometry.rule)
    compact, raw = compressed * geometry.keep, tiles[:, 1] - compressed * geometry.lag
    return _longest_first(tiles, compact + raw)


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
    return _longest_first(tiles, lengths - unseen)


def _tiles(
    geometry: Geometry, block: int, *, aligned: bool, first: int = 0, lengths: Sequence[int] | None = None
) -> Tensor:
    pieces = []
    for index, length in enumerate(geometry.lengths if lengths is None else lengths):
        start = first - (first - geometry.sink) % block if aligned else first
        starts = torch.arange(start, length, block)
        pieces.append(torch.stack([torch.full_like(starts, index), starts], dim=1))
    return torch.cat(pieces)


def _longest_first(tiles: Tensor, work: Tensor) -> Tensor:
    return tiles[work.argsort(descending=True, stable=True)]
