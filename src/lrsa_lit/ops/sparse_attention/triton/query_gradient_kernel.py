"""The gradient of the queries: one program per tile of queries and query head."""

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


def query_gradient(saved: host.Saved, output_grad: Tensor, geometry: Geometry, scale: float) -> tuple[Tensor, Tensor]:
    """dQ (B, Hq, Tq, D), and the row sums of output x gradient (B, Hq, Tq), which the other kernel needs, too."""
    inputs, dim = saved.inputs, saved.inputs.query.shape[3]
    query_grad, delta = torch.empty_like(inputs.query), torch.empty_like(saved.lse)
    if hopper.suits(*inputs, output_grad):
        hopper.query_gradient_pipeline.launch(saved, output_grad, delta, query_grad, geometry, scale)
        return query_grad, delta
    tile = host.tiles_for(dim, query_grad.dtype).query
    programs, tables, counts = query_walk(inputs, geometry, tile.rows)
    _query_kernel[(programs,)](
        *inputs, *host.row_descriptors(tile.columns, dim, *inputs[1:]),
        saved.output, output_grad, saved.lse, delta, query_grad, *tables,
        *host.row_strides(*inputs[:3], saved.output, output_grad, query_grad),
        *counts, inputs.compact_key.shape[2], *geometry.numbers, scale * host.LOG2_E, scale, **tile.options(dim),
    )  # fmt: skip
    return query_grad, delta


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _query_kernel(
    p_query, p_key, p_value, p_compact_key, p_compact_value, d_key, d_value, d_compact_key, d_compact_value,
    p_output, p_do, p_lse, p_delta, p_dq, p_tiles, p_sequences,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    n_batch_heads, heads, group, n_queries, n_rows, sink, lag, keep, chunk, scale_log2, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dQ of one tile of queries of one head."""
    i_b, i_h, i_bh, p_sequence, i_query_row, i_first, o_t, m_t, i_low, i_high = device.query_tile(
        p_tiles, p_sequences, n_batch_heads, heads, BLOCK_M
    )
    i_kv = i_h // group
    o_row = (i_query_row + o_t).to(tl.int64)
    # [BLOCK_M, PADDED]
    b_do = device.load_tile(p_do + i_b * stride_gb + i_h * stride_gh, o_row, stride_gt, m_t, DIM, PADDED)
    b_output = device.load_tile(p_output + i_b * stride_ob + i_h * stride_oh, o_row, stride_ot, m_t, DIM, PADDED)
    b_delta = tl.sum(b_output.to(tl.float32) * b_do.to(tl.float32), axis=1)
    o_rows = i_bh * n_queries + o_row
    tl.store(p_delta + o_rows, b_delta, mask=m_t)
    # An infinite log-sum-exp makes P zero in rows without a query.
    b_lse = tl.load(p_lse + o_rows, mask=m_t, other=float("inf"))
    b_query = device.load_tile(p_query + i_b * stride_qb + i_h * stride_qh, o_row, stride_qt, m_t, DIM, PADDED)
    state = (tl.zeros([BLOCK_M, PADDED], tl.float32),)
    o_compact = (i_b * (heads // group) + i_kv) * n_rows * DIM
    compact = p_compact_key + o_compact, p_compact_value + o_compact, DIM, DIM, d_compact_key, d_compact_value
    raw = p_key, p_value, (stride_kb, stride_kh, stride_kt), (stride_vb, stride_vh, stride_vt), d_key, d_value
    tile = b_query, b_do, b_lse, b_delta
    (b_dq,) = device.walk_sources(
        state, tile, (o_t, i_low, i_high), (i_b, i_kv, p_sequence), compact, raw, (sink, lag, keep, chunk),
        scale_log2, _query_block, DIM, PADDED, PRECISION, BLOCK_N,
    )  # fmt: skip
    p_dq += i_b * stride_db + i_h * stride_dh
    device.store_rows(p_dq, i_query_row + i_first, stride_dt, m_t, b_dq * scale, DIM, BLOCK_M, PADDED)


@triton.jit
def _query_block(state, tile, b_key, b_value, m_visible, scale_log2, PRECISION: tl.constexpr):
    """Add the contribution of one block of keys to dQ, before the scale."""
    (b_dq,) = state
    b_query, b_do, b_lse, b_delta = tile
    # [BLOCK_M, BLOCK_N]
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_value), input_precision=PRECISION)
    b_p = tl.exp2(b_score * scale_log2 - b_lse[:, None])
    if m_visible is not None:
        b_p = tl.where(m_visible, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    # [BLOCK_M, PADDED]
    return (tl.dot(b_ds.to(b_key.dtype), b_key, b_dq, input_precision=PRECISION),)
