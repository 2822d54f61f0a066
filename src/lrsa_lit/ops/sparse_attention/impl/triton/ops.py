"""The kernels as registered operators, with fake implementations and autograd: torch.compile sees three opaque calls.

Operators take integers and tensors only: ``numbers`` are queries_from, keys_from, S, L, K and C of a
:class:`~lrsa_lit.ops.sparse_attention.impl.triton.plan.Geometry`.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, P partitions, L lag_size, M compact rows, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.impl.triton.backward import attend_backward
from lrsa_lit.ops.sparse_attention.impl.triton.forward import Saved, attend_forward
from lrsa_lit.ops.sparse_attention.impl.triton.gather import gather_compact
from lrsa_lit.ops.sparse_attention.impl.triton.plan import Geometry
from lrsa_lit.ops.sparse_attention.impl.triton.scoring import select_ranks

# The tables of plan.py outlive a call: memory that CUDA graph trees must not recycle.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("lrsa_lit::select_lag_relative", mutates_args=(), tags=_TAGS)
def select_lag_relative(
    key: Tensor, value: Tensor, boundaries: Sequence[int], numbers: Sequence[int], weight: float, partitions: int
) -> tuple[Tensor, Tensor]:
    """Ranks (B, H, P, L) int32 and scores (B, H, P, L) float32 of lag-relative selection; see ``scoring``."""
    return select_ranks(_rows(key), _rows(value), _geometry(boundaries, numbers), weight)


@select_lag_relative.register_fake
def _(
    key: Tensor, value: Tensor, boundaries: Sequence[int], numbers: Sequence[int], weight: float, partitions: int
) -> tuple[Tensor, Tensor]:
    shape = key.shape[0], key.shape[1], partitions, numbers[3]
    return key.new_empty(shape, dtype=torch.int32), key.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("lrsa_lit::gather_compact", mutates_args=(), tags=_TAGS)
def gather(
    key: Tensor, value: Tensor, ranks: Tensor, boundaries: Sequence[int], numbers: Sequence[int], rows: int
) -> tuple[Tensor, Tensor]:
    """Compact keys and values (B, H, M, D) of a selection; see ``gather``. Not differentiable: ``attend`` is."""
    return gather_compact(_rows(key), _rows(value), ranks, _geometry(boundaries, numbers))


@gather.register_fake
def _(
    key: Tensor, value: Tensor, ranks: Tensor, boundaries: Sequence[int], numbers: Sequence[int], rows: int
) -> tuple[Tensor, Tensor]:
    shape = key.shape[0], key.shape[1], rows, key.shape[3]
    return key.new_empty(shape), value.new_empty(shape)


@torch.library.custom_op("lrsa_lit::attend", mutates_args=(), tags=_TAGS)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compact_key: Tensor,
    compact_value: Tensor,
    ranks: Tensor | None,
    boundaries: Sequence[int],
    numbers: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Tq, D) and log2 of the softmax's denominator (B, Hq, Tq); see ``forward``.

    With ``ranks`` the compact buffer holds copies of raw tokens: their gradient goes to the tokens, not to the buffer.
    """
    compact = compact_key.contiguous(), compact_value.contiguous()
    return attend_forward(_rows(query), _rows(key), _rows(value), *compact, _geometry(boundaries, numbers), scale)


@attend.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("lrsa_lit::attend_backward", mutates_args=(), tags=_TAGS)
def attend_grad(
    saved: Sequence[Tensor],
    output_grad: Tensor,
    ranks: Tensor | None,
    boundaries: Sequence[int],
    numbers: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, compact keys and compact values; see ``backward``."""
    query, key, value, compact_key, compact_value, output, denominator = saved
    inputs = _rows(query), _rows(key), _rows(value), compact_key.contiguous(), compact_value.contiguous()
    results = Saved(*inputs, output, denominator)
    return attend_backward(results, _rows(output_grad), ranks, _geometry(boundaries, numbers), scale)


@attend_grad.register_fake
def _(saved: Sequence[Tensor], output_grad: Tensor, ranks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    query, key, value, compact_key, compact_value = saved[:5]
    rows = compact_key.shape[2] if ranks is None else 0
    compact = (*compact_key.shape[:2], rows, compact_key.shape[3])
    raw = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    return *raw, compact_key.new_empty(compact), compact_value.new_empty(compact)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ranks, ctx.boundaries, ctx.numbers, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, ranks)


def _backward(ctx: Any, output_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, ranks = ctx.saved_tensors
    grads = attend_grad(saved, output_grad, ranks, ctx.boundaries, ctx.numbers, ctx.scale)
    raw, compact = grads[:3], grads[3:]
    return *raw, *((None, None) if ranks is not None else compact), None, None, None, None


attend.register_autograd(_backward, setup_context=_keep_for_backward)


def _geometry(boundaries: Sequence[int], numbers: Sequence[int]) -> Geometry:
    return Geometry(tuple(boundaries), *numbers)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, whatever its other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
