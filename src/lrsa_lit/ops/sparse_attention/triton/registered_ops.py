"""The kernels as registered operators, with fake implementations and autograd: torch.compile sees three opaque calls.

Operators take integers and tensors only, and so a geometry as its list. ``select_lag_relative``, ``gather`` and
``attend`` go through them only where somebody traces or watches the calls: the dispatcher's bookkeeping costs the host
more than the launches, and short sequences wait for the host.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, P partitions, L lag_size, M compact rows, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lrsa_lit.ops.sparse_attention.geometry import compact_size, partition_counts
from lrsa_lit.ops.sparse_attention.triton.backward_pass import attend_backward
from lrsa_lit.ops.sparse_attention.triton.call_geometry import Geometry
from lrsa_lit.ops.sparse_attention.triton.forward_kernel import attend_forward
from lrsa_lit.ops.sparse_attention.triton.gather_kernel import gather_compact
from lrsa_lit.ops.sparse_attention.triton.kernel_inputs import Inputs, Saved, with_rows
from lrsa_lit.ops.sparse_attention.triton.select_kernels import select_ranks
from lrsa_lit.ops.sparse_attention.triton.work_tables import TAGS


def select_lag_relative(
    key: Tensor, value: Tensor, geometry: Geometry, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Ranks (B, H, P, L) int32 and scores (B, H, P, L) float32 of lag-relative selection; see ``select_ranks``."""
    run = _select_op if _watched(key) else _select
    ranks, scores = run(key, value, geometry.to_list(), weights)
    return ranks, scores


def gather(key: Tensor, value: Tensor, ranks: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Compact keys and values (B, H, M, D); see ``gather_compact``. Not differentiable: ``attend`` is."""
    run = _gather_op if _watched(key) else _gather
    compact_key, compact_value = run(key, value, ranks, geometry.to_list())
    return compact_key, compact_value


def attend(inputs: Inputs, ranks: Tensor | None, geometry: Geometry, scale: float) -> Tensor:
    """Output (B, Hq, Tq, D); see ``attend_forward``.

    With ``ranks`` the compact buffer holds copies of raw tokens: their gradient goes to the tokens, not to the buffer.
    """
    arguments = *inputs, ranks, geometry.to_list(), scale
    output: Tensor = _attend_op(*arguments)[0] if _watched(inputs.query) else _Attend.apply(*arguments)
    return output


def _watched(tensor: Tensor) -> bool:
    """Whether the call must go through the dispatcher: under torch.compile, fake tensors, or a dispatch mode."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter) or is_in_torch_dispatch_mode()


def _select(key: Tensor, value: Tensor, numbers: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return select_ranks(with_rows(key), with_rows(value), Geometry.from_list(numbers), weights)


def _gather(key: Tensor, value: Tensor, ranks: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    return gather_compact(with_rows(key), with_rows(value), ranks, Geometry.from_list(numbers))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, compact_key: Tensor, compact_value: Tensor,
    ranks: Tensor | None, numbers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, Hq, Tq, D) and the base-2 log-sum-exp (B, Hq, Tq), which the backward reads."""
    inputs = Inputs(query, key, value, compact_key, compact_value)
    return attend_forward(inputs.for_kernels(), Geometry.from_list(numbers), scale)


def _attend_grad(
    saved: Sequence[Tensor], output_grad: Tensor, ranks: Tensor | None, numbers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, compact keys and compact values; see ``attend_backward``."""
    *inputs, output, lse = saved
    results = Saved(Inputs(*inputs).for_kernels(), output, lse)
    return attend_backward(results, with_rows(output_grad), ranks, Geometry.from_list(numbers), scale)


_select_op = torch.library.custom_op("lrsa_lit::select_lag_relative", _select, mutates_args=(), tags=TAGS)
_gather_op = torch.library.custom_op("lrsa_lit::gather_compact", _gather, mutates_args=(), tags=TAGS)
_attend_op = torch.library.custom_op("lrsa_lit::attend", _attend, mutates_args=(), tags=TAGS)
_attend_grad_op = torch.library.custom_op("lrsa_lit::attend_backward", _attend_grad, mutates_args=(), tags=TAGS)


@_select_op.register_fake
def _(key: Tensor, value: Tensor, numbers: Sequence[int], weights: Any) -> tuple[Tensor, Tensor]:
    geometry = Geometry.from_list(numbers)
    shape = *key.shape[:2], sum(partition_counts(geometry.boundaries, geometry.rule)), geometry.lag
    return key.new_empty(shape, dtype=torch.int32), key.new_empty(shape, dtype=torch.float32)


@_gather_op.register_fake
def _(key: Tensor, value: Tensor, ranks: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    geometry = Geometry.from_list(numbers)
    rule = geometry.rule
    rows = sum(compact_size(count, rule) for count in partition_counts(geometry.boundaries, rule))
    shape = *key.shape[:2], rows, key.shape[3]
    return key.new_empty(shape), value.new_empty(shape)


@_attend_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@_attend_grad_op.register_fake
def _(saved: Sequence[Tensor], output_grad: Tensor, ranks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    query, key, value, compact_key, compact_value = saved[:5]
    rows = compact_key.shape[2] if ranks is None else 0
    compact = (*compact_key.shape[:2], rows, compact_key.shape[3])
    raw = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    return *raw, compact_key.new_empty(compact), compact_value.new_empty(compact)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ranks, ctx.numbers, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, ranks)


def _backward(ctx: Any, output_grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, ranks = ctx.saved_tensors
    run = _attend_grad_op if _watched(output_grad) else _attend_grad
    grads = run(saved, output_grad, ranks, ctx.numbers, ctx.scale)
    raw, compact = grads[:3], grads[3:]
    return *raw, *((None, None) if ranks is not None else compact), None, None, None


_attend_op.register_autograd(_backward, setup_context=_keep_for_backward)


class _Attend(torch.autograd.Function):
    """The same as the registered operator ``attend``, straight from autograd to the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Output (B, Hq, Tq, D). A ``setup_context`` would read the signature of this method at each call."""
        results = _attend(*inputs)
        _keep_for_backward(ctx, inputs, results)
        return results[0]

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs of :meth:`forward`."""
        return _backward(ctx, output_grad, None)
