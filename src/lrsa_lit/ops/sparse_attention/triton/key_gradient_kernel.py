"""The attention backward, and its kernel for the gradient of keys and values: one program per tile of keys.

One kernel computes dQ, another dK and dV. Both recompute the scores, which takes seven products per tile instead of
five but needs no synchronisation between programs. There are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton import device_functions as device
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.query_gradient_kernel import query_gradient
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, compact_tiles, raw_tiles, sequence_table

_PROGRAMS = 512
"""The number of programs that keep a large GPU busy; with fewer, the heads of a group are split over programs."""


def attend_backward(
    saved: host.Saved, output_grad: Tensor, ranks: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, and of compact keys and values, from the output's gradient (B, Hq, Tq, D).

    With ``ranks`` (B, H, P, L), the buffer holds copies of tokens, at most one per token. Their gradient is added to
    the tokens' gradient, and the buffer gets none.
    """
    saved, output_grad = saved._replace(inputs=saved.inputs.for_kernels()), host.with_rows(output_grad)
    query_grad, delta = query_gradient(saved, output_grad, geometry, scale)
    partial = compact_gradient(saved, output_grad, delta, geometry, scale)
    key_grad, value_grad = raw_gradient(saved, output_grad, delta, partial, ranks, geometry, scale)
    if ranks is not None:
        return query_grad, key_grad, value_grad, None, None
    compact_key_grad, compact_value_grad = (source.sum(dim=0).to(key_grad.dtype) for source in partial)
    return query_grad, key_grad, value_grad, compact_key_grad, compact_value_grad


def compact_gradient(
    saved: host.Saved, output_grad: Tensor, delta: Tensor, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """dK and dV of the compact buffer, float32 (splits, B, H, M, D): the contribution of each split of query heads."""
    query, _, _, *compact = saved.inputs
    batch, heads, rows, dim = compact[0].shape
    on_hopper = hopper.suits(query, *compact, output_grad)
    tile = hopper.key_gradient_pipeline.TILE if on_hopper else host.tiles_for(dim, query.dtype).key
    table = compact_tiles(geometry, query.device, tile.rows)
    splits = _splits(table.shape[0] * batch * heads, query.shape[1] // heads)
    shape = splits, batch, heads, rows, dim
    partial = query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)
    if on_hopper and table.shape[0]:
        hopper.key_gradient_pipeline.launch(saved, output_grad, delta, partial, table, geometry, scale)
    elif table.shape[0]:
        _launch(saved, output_grad, delta, partial, None, None, table, geometry, scale)
    return partial


def raw_gradient(
    saved: host.Saved, output_grad: Tensor, delta: Tensor, partial: tuple[Tensor, Tensor], ranks: Tensor | None,
    geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV of the raw tokens (B, H, T, D); with ``ranks``, the gradient of each token's compact copy is added."""
    query, key, value = saved.inputs[:3]
    grads = torch.empty_like(key), torch.empty_like(value)
    table = raw_tiles(geometry, key.device, host.tiles_for(query.shape[3], query.dtype).key.rows)
    _launch(saved, output_grad, delta, partial, ranks, grads, table, geometry, scale)
    return grads


def _launch(
    saved: host.Saved, output_grad: Tensor, delta: Tensor, partial: tuple[Tensor, Tensor], ranks: Tensor | None,
    grads: tuple[Tensor, Tensor] | None, table: Tensor, geometry: Geometry, scale: float
) -> None:  # fmt: skip
    """Fill ``grads`` of the raw tokens or, if they are None, ``partial`` of the compact buffer."""
    query, key, value, *compact = saved.inputs
    batch, query_heads, queries, dim = query.shape
    heads, splits = key.shape[1], partial[0].shape[0]
    source, target = (compact, (key, value)) if grads is None else ((key, value), grads)
    tile = host.tiles_for(dim, query.dtype).key
    _key_kernel[(table.shape[0] * batch * heads * (splits if grads is None else 1),)](
        query, *source, output_grad,
        *host.row_descriptors(tile.columns, dim, query, output_grad),
        saved.lse, delta, *partial, ranks, *target, table, sequence_table(geometry, query.device),
        *host.row_strides(query, *source, output_grad, *target),
        batch * heads, heads, query_heads // heads, queries, compact[0].shape[2],
        0 if ranks is None else ranks.shape[2], splits, *geometry.numbers, scale * host.LOG2_E, scale,
        COMPACT=grads is None, **tile.options(dim, keys_are_rows=True),
    )  # fmt: skip


@functools.lru_cache
def _splits(programs: int, group: int) -> int:
    """The number of programs for the query heads of a group: a divisor of G."""
    enough = [count for count in range(1, group + 1) if group % count == 0 and programs * count >= _PROGRAMS]
    return enough[0] if enough else group


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _key_kernel(
    p_query, p_key, p_value, p_do, d_query, d_do, p_lse, p_delta, p_partial_key, p_partial_value, p_ranks, p_dk, p_dv,
    p_tiles, p_sequences,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_ab, stride_ah, stride_at, stride_cb, stride_ch, stride_ct,
    n_batch_heads, heads, group, n_queries, n_rows, n_partitions, n_splits, sink, lag, keep, chunk, scale_log2, scale,
    COMPACT: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dK and dV of one tile of compact rows or raw tokens of one key-value head, over all queries that see it.

    If COMPACT, the group's heads are split over ``n_splits`` programs, which store float32 sums in separate buffers.
    Otherwise the gradient of a token's compact copy, if it has one, is added before the only rounding.
    """
    n_programs = n_batch_heads
    i_split = 0
    if COMPACT:
        n_programs = n_batch_heads * n_splits
        i_split = tl.program_id(0) % n_splits
    i_tile = tl.program_id(0) // n_programs
    i_bh = tl.program_id(0) % n_programs
    if COMPACT:
        i_bh = i_bh // n_splits
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    p_sequence = p_sequences + tl.load(p_tiles + i_tile * 2) * device.COLUMNS
    i_first = tl.load(p_tiles + i_tile * 2 + 1)
    n_compressed = tl.load(p_sequence + device.PARTITIONS)
    i_query_row = tl.load(p_sequence + device.QUERY_ROW)
    i_query_from, i_query_to = tl.load(p_sequence + device.QUERY_FROM), tl.load(p_sequence + device.QUERY_TO)
    if COMPACT:
        i_row = tl.load(p_sequence + device.COMPACT_ROW)
        i_low = i_first
        i_high = tl.minimum(i_first + BLOCK_N, sink + n_compressed * keep)
    else:
        i_row = tl.load(p_sequence + device.KEY_ROW)
        i_low = tl.maximum(i_first, tl.load(p_sequence + device.KEY_FROM))
        i_high = tl.minimum(i_first + BLOCK_N, tl.load(p_sequence + device.KEY_TO))
    o_n = i_first + tl.arange(0, BLOCK_N)
    m_n = (o_n >= i_low) & (o_n < i_high)
    o_row = (i_row + o_n).to(tl.int64)
    # [BLOCK_N, PADDED]
    b_key = device.load_tile(p_key + i_b * stride_kb + i_h * stride_kh, o_row, stride_kt, m_n, DIM, PADDED)
    b_value = device.load_tile(p_value + i_b * stride_vb + i_h * stride_vh, o_row, stride_vt, m_n, DIM, PADDED)
    b_dk = tl.zeros([BLOCK_N, PADDED], tl.float32)
    b_dv = tl.zeros([BLOCK_N, PADDED], tl.float32)

    i_start = tl.maximum(device.first_seen_by(i_low, sink, lag, keep, chunk, COMPACT), i_query_from)
    i_full_from = device.first_seen_by(i_high - 1, sink, lag, keep, chunk, COMPACT)
    i_full_to = tl.minimum(device.lost_to(i_low, sink, lag, chunk, COMPACT), i_query_to)
    i_stop = tl.minimum(device.lost_to(i_high - 1, sink, lag, chunk, COMPACT), i_query_to)
    i_begin, i_end, n_masked = device.split_blocks(i_start, i_full_from, i_full_to, i_stop, BLOCK_M)
    o_m = tl.arange(0, BLOCK_M)
    o_seen = device.first_seen_by(o_n, sink, lag, keep, chunk, COMPACT)
    o_lost = device.lost_to(o_n, sink, lag, chunk, COMPACT)
    n_group = group // n_splits if COMPACT else group
    i_group = i_h * group + i_split * n_group
    p_query += i_b * stride_qb
    p_do += i_b * stride_gb
    o_scalars = i_b * heads * group * n_queries + i_query_row
    # One loop over the blocks of all heads, so that loads are prefetched across heads. It runs backwards, so that
    # programs that run together start at the same queries, the last ones, and share them in L2.
    n_full = i_end - i_begin
    for i_step in range(0, n_group * n_full, BLOCK_M):
        i_query_head = i_group + i_step // n_full
        i_m = i_end - BLOCK_M - i_step % n_full
        # [BLOCK_M, PADDED]
        p_q, p_g = p_query + i_query_head * stride_qh, p_do + i_query_head * stride_gh
        b_query = device.load_block(d_query, i_b, i_query_head, p_q, i_query_row + i_m, stride_qt, DIM, BLOCK_M, PADDED)
        b_do = device.load_block(d_do, i_b, i_query_head, p_g, i_query_row + i_m, stride_gt, DIM, BLOCK_M, PADDED)
        o_scalar = o_scalars + i_query_head * n_queries + i_m + o_m
        block = b_query, b_do, tl.load(p_lse + o_scalar), tl.load(p_delta + o_scalar)
        b_dk, b_dv = _key_block(b_dk, b_dv, b_key, b_value, block, None, scale_log2, PRECISION)
    for i_step in range(0, n_group * n_masked, BLOCK_M):
        i_query_head = i_group + i_step // n_masked
        i_m = device.masked_block(i_step % n_masked, i_start, i_begin, i_end)
        # [BLOCK_M, PADDED]
        p_q, p_g = p_query + i_query_head * stride_qh, p_do + i_query_head * stride_gh
        b_query = device.load_rows(p_q, i_query_row + i_m, stride_qt, i_stop - i_m, DIM, BLOCK_M, PADDED, True)
        b_do = device.load_rows(p_g, i_query_row + i_m, stride_gt, i_stop - i_m, DIM, BLOCK_M, PADDED, True)
        o_t = i_m + o_m
        o_scalar = o_scalars + i_query_head * n_queries + o_t
        b_lse = tl.load(p_lse + o_scalar, mask=o_t < i_stop, other=float("inf"))
        block = b_query, b_do, b_lse, tl.load(p_delta + o_scalar, mask=o_t < i_stop, other=0.0)
        m_visible = (o_t[None, :] >= o_seen[:, None]) & (o_t[None, :] < o_lost[:, None])
        b_dk, b_dv = _key_block(b_dk, b_dv, b_key, b_value, block, m_visible, scale_log2, PRECISION)

    b_dk *= scale
    if COMPACT:
        o_head = ((i_split * n_batch_heads + i_bh).to(tl.int64) * n_rows + i_row) * DIM
        device.store_rows(p_partial_key + o_head, i_first, DIM, m_n, b_dk, DIM, BLOCK_N, PADDED)
        device.store_rows(p_partial_value + o_head, i_first, DIM, m_n, b_dv, DIM, BLOCK_N, PADDED)
    else:
        if p_ranks is not None:
            # [BLOCK_N]: the token's row in the buffer, -1 if it has none
            o_partitioned = o_n - sink
            m_compressed = m_n & (o_partitioned >= 0) & (o_partitioned < n_compressed * lag)
            i_partition = i_bh.to(tl.int64) * n_partitions + tl.load(p_sequence + device.PARTITION_ROW)
            o_rank = i_partition * lag + o_partitioned
            b_rank = tl.load(p_ranks + o_rank, mask=m_compressed, other=-1)
            b_slot = tl.where(b_rank >= 0, sink + o_partitioned // lag * keep + b_rank, -1)
            b_slot = tl.where((o_n < sink) & (n_compressed > 0), o_n, b_slot)
            o_dim = tl.arange(0, PADDED)
            m_kept = (m_n & (b_slot >= 0))[:, None] & (o_dim < DIM)[None, :]
            i_compact_row = tl.load(p_sequence + device.COMPACT_ROW)
            for i_part in range(0, n_splits):
                o_head = ((i_part * n_batch_heads + i_bh).to(tl.int64) * n_rows + i_compact_row) * DIM
                o_kept = o_head + b_slot[:, None] * DIM + o_dim[None, :]
                b_dk += tl.load(p_partial_key + o_kept, mask=m_kept, other=0.0)
                b_dv += tl.load(p_partial_value + o_kept, mask=m_kept, other=0.0)
        p_dk += i_b * stride_ab + i_h * stride_ah
        device.store_rows(p_dk, i_row + i_first, stride_at, m_n, b_dk, DIM, BLOCK_N, PADDED)
        p_dv += i_b * stride_cb + i_h * stride_ch
        device.store_rows(p_dv, i_row + i_first, stride_ct, m_n, b_dv, DIM, BLOCK_N, PADDED)


@triton.jit
def _key_block(b_dk, b_dv, b_key, b_value, block, m_visible, scale_log2, PRECISION: tl.constexpr):
    """Add the contribution of one block of queries to dK (before the scale) and dV. The rows of scores are keys."""
    b_query, b_do, b_lse, b_delta = block
    # This order needs fewer registers, because dV consumes P before dP is computed.
    # [BLOCK_N, BLOCK_M]
    b_score = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION)
    b_p = tl.exp2(b_score * scale_log2 - b_lse[None, :])
    if m_visible is not None:
        b_p = tl.where(m_visible, b_p, 0.0)
    # [BLOCK_N, PADDED]
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    # [BLOCK_N, BLOCK_M]
    b_dp = tl.dot(b_value, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    # [BLOCK_N, PADDED]
    b_dk = tl.dot(b_ds.to(b_query.dtype), b_query, b_dk, input_precision=PRECISION)
    return b_dk, b_dv
