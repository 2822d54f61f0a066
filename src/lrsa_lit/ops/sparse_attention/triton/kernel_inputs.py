"""What launches hand over: the tensors that the backward reads, and descriptors for the copy engine (TMA)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
"""Scores times this are exponents of 2, the base that the hardware has."""


class Inputs(NamedTuple):
    """What the attention reads.

    Attributes:
        query: (B, Hq, Tq, D).
        key: (B, H, T, D), raw.
        value: (B, H, T, D), raw.
        compact_key: (B, H, M, D).
        compact_value: (B, H, M, D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    compact_key: Tensor
    compact_value: Tensor

    def for_kernels(self) -> Inputs:
        """The same with contiguous rows, and contiguous compact buffers."""
        compact = self.compact_key.contiguous(), self.compact_value.contiguous()
        return Inputs(with_rows(self.query), with_rows(self.key), with_rows(self.value), *compact)


class Saved(NamedTuple):
    """What the forward leaves for the backward: its inputs, output (B, Hq, Tq, D) and log-sum-exp (B, Hq, Tq)."""

    inputs: Inputs
    output: Tensor
    lse: Tensor


def row_descriptors(rows: int, columns: int, *tensors: Tensor) -> list[TensorDescriptor | None]:
    """TMA descriptors for blocks of rows of one head of (B, H, T, D); None where the copy engine cannot express it."""
    shape = [1, 1, rows, columns]
    return [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), shape) if expressible(tensor) else None
        for tensor in tensors
    ]


def row_strides(*tensors: Tensor) -> list[int]:
    """The strides of B, H and T of each of some (B, H, T, D)."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, whatever its other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale with the same products: the kernels take the maximum of the scores before they scale them."""
    if scale < 0:
        query, scale = -query, -scale
    # Masked scores are minus infinity, which zero would turn into NaN.
    return query, max(scale, 1e-30)


def expressible(tensor: Tensor) -> bool:
    """Whether the copy engine can express blocks of rows of the tensor."""
    aligned = tensor.data_ptr() % 16 == 0 and all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:3])
    return aligned and tensor.numel() > 0 and 0 not in tensor.stride()
