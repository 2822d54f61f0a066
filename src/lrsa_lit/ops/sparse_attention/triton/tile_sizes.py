"""Block sizes and launch options, by head size and dtype; measured in benchmarks/LOG.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """How one kernel is cut.

    Attributes:
        rows: queries (forward, dQ) or keys (dK and dV) that a program owns.
        columns: keys or queries that it takes in per step.
        warps: num_warps.
        stages: num_stages.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self, dim: int, *, keys_are_rows: bool = False) -> dict[str, Any]:
        """The compile-time arguments of a kernel cut like this, for a head size: BLOCK_M queries by BLOCK_N keys."""
        queries, keys = (self.columns, self.rows) if keys_are_rows else (self.rows, self.columns)
        return {
            "DIM": dim,
            "PADDED": triton.next_power_of_2(dim),
            "PRECISION": precision_of(dim),
            "BLOCK_M": queries,
            "BLOCK_N": keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    """The tiles of the three attention kernels."""

    forward: Tile
    query: Tile
    key: Tile


def tiles_for(dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a head size and dtype. float32: small blocks that fit the registers."""
    if dtype == torch.float32:
        if dim > 128:
            return Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
        return Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if dim > 128:
        return Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2))
    if dim > 64:
        return Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2))
    return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))


def precision_of(dim: int) -> str:
    """How float32 matrices are multiplied: as three TF32 products on tensor cores, or as a chain of multiply-adds.

    The chain rounds at every step and so is the less exact of the two, and 3 to 5 times slower; beyond 128 channels
    what the three products leave out weighs more (measured in benchmarks/LOG.md).
    """
    return "tf32x3" if dim <= 128 else "ieee"
