"""The attention with its gradient: as an autograd function, and as an operator for torch.compile.

The operator includes the selection, so it is all that a compiled layer's graph sees. Its output shapes depend only on
the shapes of query and key. So ranks are stored at the start of a buffer with one element per token, and the backward
gathers the compact buffer again, which is cheaper than storing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, library

from lrsa_lit.ops.sparse_attention.geometry import checked_boundaries
from lrsa_lit.ops.sparse_attention.head_rules import HeadGroups, groups_of_tensor
from lrsa_lit.ops.sparse_attention.triton.forward_kernel import attend_forward
from lrsa_lit.ops.sparse_attention.triton.fused_selection import fused_ranks
from lrsa_lit.ops.sparse_attention.triton.gather_kernel import gather_compact
from lrsa_lit.ops.sparse_attention.triton.host_functions import Inputs, Saved, positive_scale, with_rows
from lrsa_lit.ops.sparse_attention.triton.key_gradient_kernel import attend_backward
from lrsa_lit.ops.sparse_attention.triton.tape import taped
from lrsa_lit.ops.sparse_attention.triton.work_tables import TAGS, Geometry, ranks_shape


class Attend(torch.autograd.Function):
    """``apply(*Inputs, ranks, geometry, scale)`` returns the output (B, Hq, Tq, D); see ``attend_forward``.

    With ranks, the compact buffer holds copies of raw tokens, and its gradient goes to the tokens. This is not a
    registered operator, because the dispatcher takes more host time than the launches, and short sequences wait for it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Attend. There is no ``setup_context``, because it would inspect this method's signature at each call."""
        *tensors, ranks, ctx.geometry, ctx.scale = inputs
        output, lse = _attend(tensors, ctx.geometry, ctx.scale)
        ctx.save_for_backward(*tensors, output, lse, ranks)
        return output

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs of :meth:`forward`."""
        return *_differentiate_attend((output_grad, *ctx.saved_tensors), ctx.geometry, ctx.scale), None, None, None


@taped
def _attend(inputs: Sequence[Tensor], geometry: Geometry, scale: float) -> tuple[Tensor, Tensor]:
    return attend_forward(Inputs(*inputs), geometry, scale)


@taped
def _differentiate_attend(tensors: Sequence[Tensor], geometry: Geometry, scale: float) -> tuple[Tensor | None, ...]:
    output_grad, *inputs, output, lse, ranks = tensors
    return attend_backward(Saved(Inputs(*inputs), output, lse), output_grad, ranks, geometry, scale)


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    """The output (B, Hq, T, D); the arguments are those of ``api.traced_attention``."""
    output: Tensor = _forward_op(query, key, value, rule_tensor, cu_seqlens, scale)[0]
    return output


def _forward(
    query: Tensor, key: Tensor, value: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, base-2 log-sum-exp (B, Hq, T), and a buffer (B, H, T) int32 with the ranks of each group of heads."""
    groups, calls = _calls(key, rule_tensor, cu_seqlens)
    buffer = torch.empty(key.shape[:3], dtype=torch.int32, device=key.device)
    outputs = []
    for tensors, room, call in zip(_of_groups(groups, query, key, value), _rooms(groups, buffer), calls, strict=True):
        outputs.append(_forward_group(tensors, room, *call, scale))
    if len(calls) == 1:
        return *outputs[0], buffer
    attended, sums = zip(*outputs, strict=True)
    whole, lse = torch.empty_like(with_rows(query)), sums[0].new_empty(query.shape[:3])
    return groups.join_into(whole, attended), groups.join_into(lse, sums), buffer


def _forward_group(
    tensors: Sequence[Tensor], room: Tensor, geometry: Geometry, code: Sequence[float], scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = tensors
    ranks, _ = fused_ranks(code, query, key, value, geometry, _ranks_in(room, geometry))
    compact = gather_compact(key, value, ranks, geometry)
    query, scale = positive_scale(query, scale)
    return attend_forward(Inputs(query, key, value, *compact), geometry, scale)


def _backward(
    saved: Sequence[Tensor], output_grad: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, output, lse, buffer = saved
    groups, calls = _calls(tensors[1], rule_tensor, cu_seqlens)
    sums = [torch.cat(runs, dim=1) for runs in groups.views(lse)] if len(calls) > 1 else [lse]
    split = _of_groups(groups, *tensors, output, output_grad)
    grads = [
        _backward_group(parts, total, room, geometry, scale)
        for parts, total, room, (geometry, _) in zip(split, sums, _rooms(groups, buffer), calls, strict=True)
    ]
    if len(calls) == 1:
        return grads[0]
    of_each = zip(tensors, zip(*grads, strict=True), strict=True)
    query_grad, key_grad, value_grad = (
        groups.join_into(torch.empty_like(with_rows(tensor)), parts) for tensor, parts in of_each
    )
    return query_grad, key_grad, value_grad


def _backward_group(
    tensors: Sequence[Tensor], lse: Tensor, room: Tensor, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, output, output_grad = tensors
    ranks = _ranks_in(room, geometry)
    positive, size = positive_scale(query, scale)
    inputs = Inputs(positive, key, value, *gather_compact(key, value, ranks, geometry))
    left = Saved(inputs, output, lse)
    query_grad, key_grad, value_grad = attend_backward(left, output_grad, ranks, geometry, size)[:3]
    return -query_grad if scale < 0 else query_grad, key_grad, value_grad


_forward_op = library.custom_op("lrsa_lit::attention", _forward, mutates_args=(), tags=TAGS)
_backward_op = library.custom_op("lrsa_lit::attention_backward", _backward, mutates_args=(), tags=TAGS)


@_forward_op.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(with_rows(query)), lse, key.new_empty(key.shape[:3], dtype=torch.int32)


@_backward_op.register_fake
def _(saved: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(with_rows(tensor)) for tensor in saved[:3])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, rule_tensor, cu_seqlens, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, rule_tensor, cu_seqlens)


def _differentiate(ctx: Any, output_grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *saved, rule_tensor, cu_seqlens = ctx.saved_tensors
    return *_backward_op(saved, output_grad, rule_tensor, cu_seqlens, ctx.scale), None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _calls(
    key: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None
) -> tuple[HeadGroups, list[tuple[Geometry, list[float]]]]:
    """The groups of heads with the same rule, and the geometry and ``kernel_code`` of each group."""
    groups, rules = groups_of_tensor(rule_tensor, key.shape[1])
    length = key.shape[2]
    boundaries = (0, length) if cu_seqlens is None else checked_boundaries(cu_seqlens.tolist(), length)
    calls = []
    for sink, lag, keep, chunk, *code in rules:
        calls.append((Geometry(int(sink), int(lag), int(keep), int(chunk), tuple(boundaries)), code))
    return groups, calls


def _of_groups(groups: HeadGroups, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The heads of each group in some tensors (B, H or Hq, T, D)."""
    return zip(*map(groups.split, tensors), strict=True)


def _rooms(groups: HeadGroups, buffer: Tensor) -> list[Tensor]:
    """Split a buffer (B, H, T) into one contiguous part (B, heads, T) per group."""
    batch, _, length = buffer.shape
    sizes = [batch * len(heads) * length for heads in groups.heads]
    return [part.view(batch, -1, length) for part in buffer.flatten().split(sizes)]


def _ranks_in(buffer: Tensor, geometry: Geometry) -> Tensor:
    """The ranks (B, H, P, L) at the start of a buffer."""
    shape = ranks_shape(buffer, geometry)
    return buffer.flatten()[: math.prod(shape)].view(shape)
