"""Arguments of kernel launches: tensors, descriptors for the copy engine (TMA), block sizes and launch options.

The choice of sizes and options by head size and dtype is documented in benchmarks/LOG.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
"""Factor that turns scores into exponents of 2, the base of the hardware's exponential."""

INTEGERS = [
    "n_work", "n_batch_heads", "heads", "group", "n_splits", "n_queries", "n_rows", "n_partitions", "stride_lb",
    "sink", "lag", "keep", "chunk", "last", "window",
]  # fmt: skip
"""Arguments that kernels are not specialised on, so that new values do not cause recompilation."""


def triton_is_among(versions: tuple[str, ...]) -> bool:
    """Whether the installed Triton is a release of one of these versions, such as 3.6."""
    return ".".join(triton.__version__.split(".")[:2]) in versions


class Inputs(NamedTuple):
    """Inputs of the attention: queries (B, Hq, Tq, D), raw keys and values (B, H, T, D), compact ones (B, H, M, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    compact_key: Tensor
    compact_value: Tensor

    def for_kernels(self) -> Inputs:
        """The same with contiguous rows and contiguous compact buffers."""
        return Inputs(*map(with_rows, self[:3]), *(tensor.contiguous() for tensor in self[3:]))


class Saved(NamedTuple):
    """Tensors saved for the backward: inputs, output (B, Hq, Tq, D) and log-sum-exp (B, Hq, Tq)."""

    inputs: Inputs
    output: Tensor
    lse: Tensor


def row_descriptors(rows: int, dim: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """TMA descriptors for blocks of rows of one head of (B, H, T, D); None for layouts that TMA does not support."""
    shape = [1, 1, rows, power_of_two(dim)]
    return [descriptor(TensorDescriptor, tensor, shape) if expressible(tensor) else None for tensor in tensors]


def descriptor(kind: type[Any], tensor: Tensor, block: list[int], **more: Any) -> Any:
    """A descriptor of Triton's or Gluon's for blocks of an ``expressible`` tensor.

    Their constructors check the layout again, which takes more time than everything else here.
    """
    made = object.__new__(kind)
    made.__dict__ = {"base": tensor, "shape": tensor.shape, "strides": tensor.stride(), "block_shape": block, **more}
    return made


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number. Triton's own function takes microseconds."""
    return 1 << (number - 1).bit_length()


def row_strides(*tensors: Tensor) -> list[int]:
    """The strides of B, H and T for each tensor (B, H, T, D)."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, or else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale with a positive scale and the same product: kernels take the maximum of unscaled scores."""
    if scale < 0:
        query, scale = -query, -scale
    # Masked scores are minus infinity; a scale of zero would turn them into NaN.
    return query, max(scale, 1e-30)


def expressible(tensor: Tensor) -> bool:
    """Whether TMA supports the layout of a tensor (B, H, T, D) for blocks of rows."""
    batch, heads, rows, channels = tensor.stride()
    if tensor.data_ptr() % 16 or (batch | heads | rows) * tensor.itemsize % 16:
        return False
    return bool(batch and heads and rows and channels and tensor.numel())


class Tile(NamedTuple):
    """A kernel's tile: the rows of a program are queries (forward, dQ) or keys (dK, dV); it reads columns per step."""

    rows: int
    columns: int
    warps: int
    stages: int

    def options(self, dim: int, *, keys_are_rows: bool = False) -> dict[str, Any]:
        """The compile-time arguments of a kernel with this tile, for a head size: BLOCK_M queries by BLOCK_N keys."""
        queries, keys = (self.columns, self.rows) if keys_are_rows else (self.rows, self.columns)
        return {
            "DIM": dim,
            "PADDED": power_of_two(dim),
            # float32 matrices are multiplied by three TF32 products on tensor cores, or by multiply-adds, which round
            # at every step and are 3 to 5 times slower. Above 128 channels, the error of the TF32 products is larger.
            "PRECISION": "tf32x3" if dim <= 128 else "ieee",
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


@functools.lru_cache
def tiles_for(dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a head size and dtype; small blocks for float32, to fit into registers."""
    if dtype == torch.float32:
        if dim > 128:
            return Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
        return Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if dim > 128:
        return Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2))
    if dim > 64:
        return Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2))
    return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
