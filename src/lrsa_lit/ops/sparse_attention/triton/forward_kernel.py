"""The attention forward: one pass over the compact prefix and the raw range of each tile of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton import device_functions as device
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, query_walk


def attend_forward(inputs: host.Inputs, geometry: Geometry, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query over its prefix of the compact buffer and its range of raw tokens, for a scale > 0.

    Returns:
        Output (B, Hq, Tq, D) in the query's memory layout; base-2 log-sum-exp of its scores (B, Hq, Tq) float32.
    """
    inputs = inputs.for_kernels()
    query, dim = inputs.query, inputs.query.shape[3]
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if hopper.suits(*inputs):
        hopper.forward_pipeline.launch(inputs, output, lse, geometry, scale)
        return output, lse
    tile = host.tiles_for(dim, query.dtype).forward
    programs, tables, counts = query_walk(inputs, geometry, tile.rows)
    _forward_kernel[(programs,)](
        *inputs, *host.row_descriptors(tile.columns, dim, *inputs[1:]), output, lse, *tables,
        *host.row_strides(*inputs[:3], output), *counts, inputs.compact_key.shape[2], *geometry.numbers,
        scale * host.LOG2_E, **tile.options(dim),
    )  # fmt: skip
    return output, lse


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _forward_kernel(
    p_query, p_key, p_value, p_compact_key, p_compact_value, d_key, d_value, d_compact_key, d_compact_value,
    p_output, p_lse, p_tiles, p_sequences,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    n_batch_heads, heads, group, n_queries, n_rows, sink, lag, keep, chunk, scale_log2,
    DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries of one head."""
    i_b, i_h, i_bh, p_sequence, i_query_row, i_first, o_t, m_t, i_low, i_high = device.query_tile(
        p_tiles, p_sequences, n_batch_heads, heads, BLOCK_M
    )
    i_kv = i_h // group
    o_row = (i_query_row + o_t).to(tl.int64)
    # [BLOCK_M, PADDED]
    b_query = device.load_tile(p_query + i_b * stride_qb + i_h * stride_qh, o_row, stride_qt, m_t, DIM, PADDED)
    state = (
        tl.zeros([BLOCK_M, PADDED], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], device.LOWEST, tl.float32),
    )
    o_compact = (i_b * (heads // group) + i_kv) * n_rows * DIM
    compact = p_compact_key + o_compact, p_compact_value + o_compact, DIM, DIM, d_compact_key, d_compact_value
    raw = p_key, p_value, (stride_kb, stride_kh, stride_kt), (stride_vb, stride_vh, stride_vt), d_key, d_value
    b_output, b_sum, b_max = device.walk_sources(
        state, (b_query,), (o_t, i_low, i_high), (i_b, i_kv, p_sequence), compact, raw, (sink, lag, keep, chunk),
        scale_log2, attend_block, DIM, PADDED, PRECISION, BLOCK_N,
    )  # fmt: skip

    p_output += i_b * stride_ob + i_h * stride_oh
    if b_query.dtype == tl.float32:
        b_output = tl.div_rn(b_output, tl.broadcast_to(b_sum[:, None], BLOCK_M, PADDED))
    else:
        b_output *= (1.0 / b_sum)[:, None]
    device.store_rows(p_output, i_query_row + i_first, stride_ot, m_t, b_output, DIM, BLOCK_M, PADDED)
    tl.store(p_lse + i_bh * n_queries + o_row, b_max * scale_log2 + tl.log2(b_sum), mask=m_t)


@triton.jit
def attend_block(state, tile, b_key, b_value, m_visible, scale_log2, PRECISION: tl.constexpr):
    """One step of the online softmax, in base 2."""
    b_output, b_sum, b_max = state
    (b_query,) = tile
    # [BLOCK_M, BLOCK_N]
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    if m_visible is not None:
        b_score = tl.where(m_visible, b_score, float("-inf"))
    # Subtract first, then scale, so that P of the highest score is exactly 1. A fused multiply-add would be off by the
    # rounding of the highest score, which at scores of 1e5 exceeds half precision's rounding.
    b_top = tl.maximum(b_max, tl.max(b_score, axis=1))
    b_p = tl.exp2((b_score - b_top[:, None]) * scale_log2)
    b_decay = tl.exp2((b_max - b_top) * scale_log2)
    b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
    b_output = b_output * b_decay[:, None]
    # [BLOCK_M, PADDED]
    if b_value.dtype == tl.float32:
        # A running sum over all keys rounds at each key; summing within blocks first rounds less.
        b_output += tl.dot(b_p, b_value, input_precision=PRECISION)
    else:
        b_output = tl.dot(b_p.to(b_value.dtype), b_value, b_output)
    return b_output, b_sum, b_top
