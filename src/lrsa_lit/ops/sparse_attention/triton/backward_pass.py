"""The attention backward: one kernel for dQ, one for dK and dV; no atomics, so every run gives the same bits.

Both recompute the scores, which costs seven products a tile instead of five and needs no order between programs.

Dimensions: B batch, H key-value heads, Hq query heads, G = Hq / H, T tokens, M rows of the compact buffer, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton.kernel_inputs import Saved
from lrsa_lit.ops.sparse_attention.triton.key_gradient_kernel import compact_tile, key_gradient
from lrsa_lit.ops.sparse_attention.triton.query_gradient_kernel import query_gradient
from lrsa_lit.ops.sparse_attention.triton.tile_sizes import tiles_for
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, compact_tiles, raw_tiles

_PROGRAMS = 512
"""Programs that keep a large GPU busy to the end; with fewer, the heads of a group are split over programs."""


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
    rows = saved.compact_key.shape[2]
    batch, query_heads = saved.query.shape[:2]
    heads, dim = saved.key.shape[1], saved.key.shape[3]
    table = compact_tiles(geometry, saved.key.device, compact_tile(saved, output_grad).rows)
    splits = _splits(len(table) * batch * heads, query_heads // heads)
    shape = splits, batch, heads, rows, dim
    partial = query_grad.new_empty(shape, dtype=torch.float32), query_grad.new_empty(shape, dtype=torch.float32)
    if len(table):
        key_gradient(saved, output_grad, delta, partial, None, None, None, table, geometry, scale)
    key_grad, value_grad = torch.empty_like(saved.key), torch.empty_like(saved.value)
    table = raw_tiles(geometry, saved.key.device, tiles_for(dim, saved.query.dtype).key.rows)
    key_gradient(saved, output_grad, delta, partial, ranks, key_grad, value_grad, table, geometry, scale)
    if ranks is not None:
        nothing = batch, heads, 0, dim
        return query_grad, key_grad, value_grad, key_grad.new_empty(nothing), value_grad.new_empty(nothing)
    compact_key_grad, compact_value_grad = (source.sum(dim=0).to(key_grad.dtype) for source in partial)
    return query_grad, key_grad, value_grad, compact_key_grad, compact_value_grad


def _splits(programs: int, group: int) -> int:
    """Over how many programs the query heads of a group are spread: a divisor of G."""
    enough = [count for count in range(1, group + 1) if group % count == 0 and programs * count >= _PROGRAMS]
    return enough[0] if enough else group
