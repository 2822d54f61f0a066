"""The attention backward: one kernel for dQ, one for dK and dV; no atomics, so every run gives the same bits.

Both recompute the scores, which costs seven products a tile instead of five and needs no order between programs.

Dimensions: B batch, H key-value heads, Hq query heads, G = Hq / H, T tokens, M rows of the compact buffer, D head_dim.
"""

from __future__ import annotations

from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton.call_geometry import Geometry
from lrsa_lit.ops.sparse_attention.triton.kernel_inputs import Saved
from lrsa_lit.ops.sparse_attention.triton.key_gradient_kernel import compact_gradient, raw_gradient
from lrsa_lit.ops.sparse_attention.triton.query_gradient_kernel import query_gradient


def attend_backward(
    saved: Saved, output_grad: Tensor, ranks: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the compact keys and values.

    Args:
        saved: inputs and outputs of the forward.
        output_grad: (B, Hq, Tq, D), any strides but the last.
        ranks: (B, H, P, L) int32 where the buffer holds copies of tokens: their gradient is then added to that of the
            tokens, each of which gets at most one, and the gradients returned for the buffer are empty. None where
            the buffer is an input of its own.
        geometry: of the call.
        scale: factor of the scores.
    """
    query_grad, delta = query_gradient(saved, output_grad, geometry, scale)
    partial = compact_gradient(saved, output_grad, delta, geometry, scale)
    key_grad, value_grad = raw_gradient(saved, output_grad, delta, partial, ranks, geometry, scale)
    if ranks is not None:
        nothing = *key_grad.shape[:2], 0, key_grad.shape[3]
        return query_grad, key_grad, value_grad, key_grad.new_empty(nothing), key_grad.new_empty(nothing)
    compact_key_grad, compact_value_grad = (source.sum(dim=0).to(key_grad.dtype) for source in partial)
    return query_grad, key_grad, value_grad, compact_key_grad, compact_value_grad
