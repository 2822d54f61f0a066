"""The kernels as registered operators, with fake implementations and autograd: opaque calls to torch.compile.

Operators take integers and tensors only, and so a geometry as its list. ``select_lag_relative``, ``gather`` and
``attend`` go through them only where somebody traces or watches the calls: the dispatcher's bookkeeping costs the host
more than the launches, and short sequences wait for the host.

``traced_attention`` is selection and attention as a single one, all that a compiled layer's graph sees. Its shapes
follow from those of query and key alone. So the ranks stand in the first elements of a buffer that holds as many as
there are tokens, and the backward gathers the compact buffer again, which is cheaper than to keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lrsa_lit.ops.sparse_attention.geometry import checked_boundaries
from lrsa_lit.ops.sparse_attention.triton.forward_kernel import attend_forward
from lrsa_lit.ops.sparse_attention.triton.gather_kernel import gather_compact
from lrsa_lit.ops.sparse_attention.triton.key_gradient_kernel import attend_backward
from lrsa_lit.ops.sparse_attention.triton.launch_arguments import Inputs, Saved, positive_scale, with_rows
from lrsa_lit.ops.sparse_attention.triton.select_kernels import select_ranks
from lrsa_lit.ops.sparse_attention.triton.work_tables import TAGS, Geometry, compact_shape, ranks_shape


def _operator(run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """``run`` as an operator of its name, of which torch.compile sees the ``fake``."""
    name = f"lrsa_lit::{run.__name__.strip('_')}"
    operator = library.custom_op(name, run, mutates_args=(), tags=TAGS)
    operator.register_fake(fake)
    return operator


def _is_watched(tensor: Tensor) -> bool:
    """Whether the call must go through the dispatcher: under torch.compile, fake tensors, or a dispatch mode."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter) or is_in_torch_dispatch_mode()


def _select(key: Tensor, value: Tensor, numbers: Sequence[int], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    return select_ranks(key, value, Geometry.from_list(numbers), weights)


def _fake_select(key: Tensor, value: Tensor, numbers: Sequence[int], weights: Any) -> tuple[Tensor, Tensor]:
    shape = ranks_shape(key, Geometry.from_list(numbers))
    return key.new_empty(shape, dtype=torch.int32), key.new_empty(shape, dtype=torch.float32)


def _gather(key: Tensor, value: Tensor, ranks: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    return gather_compact(key, value, ranks, Geometry.from_list(numbers))


def _fake_gather(key: Tensor, value: Tensor, ranks: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = compact_shape(key, Geometry.from_list(numbers))
    return key.new_empty(shape), value.new_empty(shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, compact_key: Tensor, compact_value: Tensor,
    ranks: Tensor | None, numbers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, Hq, Tq, D) and the base-2 log-sum-exp (B, Hq, Tq), which the backward reads."""
    return attend_forward(Inputs(query, key, value, compact_key, compact_value), Geometry.from_list(numbers), scale)


def _fake_attend(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(with_rows(query)), query.new_empty(query.shape[:3], dtype=torch.float32)


def _attend_backward(
    saved: Sequence[Tensor], output_grad: Tensor, ranks: Tensor | None, numbers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, compact keys and compact values."""
    results = Saved(Inputs(*saved[:5]), *saved[5:])
    return attend_backward(results, output_grad, ranks, Geometry.from_list(numbers), scale)


def _fake_backward(saved: Sequence[Tensor], output_grad: Tensor, ranks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    raw = [torch.empty_like(with_rows(tensor)) for tensor in saved[:3]]
    rows = saved[3].shape[2] if ranks is None else 0
    return *raw, *(tensor.new_empty((*tensor.shape[:2], rows, tensor.shape[3])) for tensor in saved[3:5])


_select_op, _gather_op = _operator(_select, _fake_select), _operator(_gather, _fake_gather)
_attend_op, _attend_backward_op = _operator(_attend, _fake_attend), _operator(_attend_backward, _fake_backward)


def select_lag_relative(
    key: Tensor, value: Tensor, geometry: Geometry, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Ranks (B, H, P, L) int32 and scores (B, H, P, L) float32 of lag-relative selection; see ``select_ranks``."""
    run = _select_op if _is_watched(key) else _select
    ranks, scores = run(key, value, geometry.to_list(), weights)
    return ranks, scores


def gather(key: Tensor, value: Tensor, ranks: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Compact keys and values (B, H, M, D); see ``gather_compact``. Not differentiable: ``attend`` is."""
    run = _gather_op if _is_watched(key) else _gather
    compact_key, compact_value = run(key, value, ranks, geometry.to_list())
    return compact_key, compact_value


def attend(inputs: Inputs, ranks: Tensor | None, geometry: Geometry, scale: float) -> Tensor:
    """Output (B, Hq, Tq, D); see ``attend_forward``.

    With ``ranks`` the compact buffer holds copies of raw tokens: their gradient goes to the tokens, not to the buffer.
    """
    arguments = *inputs, ranks, geometry.to_list(), scale
    output: Tensor = _attend_op(*arguments)[0] if _is_watched(inputs.query) else _Attend.apply(*arguments)
    return output


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ranks, ctx.numbers, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, ranks)


def _backward(ctx: Any, output_grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *saved, ranks = ctx.saved_tensors
    run = _attend_backward_op if _is_watched(output_grad) else _attend_backward
    grads = run(saved, output_grad, ranks, ctx.numbers, ctx.scale)
    compact = grads[3:] if ranks is None else (None, None)
    return *grads[:3], *compact, None, None, None


_attend_op.register_autograd(_backward, setup_context=_keep_for_backward)


class _Attend(torch.autograd.Function):
    """The same as the registered operator, straight from autograd to the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Output (B, Hq, Tq, D). A ``setup_context`` would read the signature of this method at each call."""
        results = _attend(*inputs)
        _keep_for_backward(ctx, inputs, results)
        return results[0]

    backward = staticmethod(_backward)


def traced_attention(
    query: Tensor, key: Tensor, value: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    """Output (B, Hq, T, D); arguments as in ``compiled_layers.traced_attention``."""
    query, scale = positive_scale(query, scale)
    output: Tensor = _traced_op(query, key, value, rule_tensor, cu_seqlens, scale)[0]
    return output


def _attention(
    query: Tensor, key: Tensor, value: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, base-2 log-sum-exp (B, Hq, T), and a buffer (B, H, T) int32 with the ranks in front."""
    geometry, weights = _call(key, rule_tensor, cu_seqlens)
    buffer = torch.empty(key.shape[:3], dtype=torch.int32, device=key.device)
    ranks, _ = select_ranks(key, value, geometry, weights, _ranks_in(buffer, geometry))
    compact = gather_compact(key, value, ranks, geometry)
    return *attend_forward(Inputs(query, key, value, *compact), geometry, scale), buffer


def _fake_attention(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_attend(query), key.new_empty(key.shape[:3], dtype=torch.int32)


def _attention_backward(
    saved: Sequence[Tensor], output_grad: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    query, key, value, output, lse, buffer = saved
    geometry, _ = _call(key, rule_tensor, cu_seqlens)
    ranks = _ranks_in(buffer, geometry)
    inputs = Inputs(query, key, value, *gather_compact(key, value, ranks, geometry))
    return attend_backward(Saved(inputs, output, lse), output_grad, ranks, geometry, scale)[:3]


def _fake_attention_backward(saved: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(with_rows(tensor)) for tensor in saved[:3])


def _call(key: Tensor, rule_tensor: Tensor, cu_seqlens: Tensor | None) -> tuple[Geometry, list[float]]:
    """The geometry, and the weights of the key and the value score."""
    sink, lag, keep, chunk, *weights = rule_tensor.tolist()
    length = key.shape[2]
    boundaries = (0, length) if cu_seqlens is None else checked_boundaries(cu_seqlens.tolist(), length)
    return Geometry(int(sink), int(lag), int(keep), int(chunk), tuple(boundaries)), weights


def _ranks_in(buffer: Tensor, geometry: Geometry) -> Tensor:
    """The ranks (B, H, P, L) in front of a buffer."""
    shape = ranks_shape(buffer, geometry)
    return buffer.flatten()[: math.prod(shape)].view(shape)


def _keep_for_traced(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, rule_tensor, cu_seqlens, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, rule_tensor, cu_seqlens)


def _traced_backward(ctx: Any, output_grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *saved, rule_tensor, cu_seqlens = ctx.saved_tensors
    return *_traced_backward_op(saved, output_grad, rule_tensor, cu_seqlens, ctx.scale), None, None, None


_traced_op = _operator(_attention, _fake_attention)
_traced_backward_op = _operator(_attention_backward, _fake_attention_backward)
_traced_op.register_autograd(_traced_backward, setup_context=_keep_for_traced)
