"""The gradient of the queries on Hopper, in Gluon: one warp loads, two warpgroups of 64 queries each compute.

Programs, tiles, the order of blocks and the transition between tiles are those of forward_pipeline.py. A block takes
three products: scores Q K^T, dP = dO V^T, and its contribution to dQ. A consumer queues scores and dP of the next
block, then this block's part of dQ, and computes in the meantime. That keeps the tensor cores busy without turns. Keys
are needed for two products, values for one and for a shorter time, so there are twice as many buffers for keys.

Names in the kernel are explained in pipeline.py.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lrsa_lit.ops.sparse_attention.gluon import pipeline
from lrsa_lit.ops.sparse_attention.gluon.pipeline import HALF, around, barriers
from lrsa_lit.ops.sparse_attention.triton import device_functions as device
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, query_walk

TILE = host.Tile(128, 64, 4, 4)
"""Warps are per consumer; stages are the buffers of keys. Values have half as many, because no more fit."""


def launch(
    saved: host.Saved, output_grad: Tensor, delta: Tensor, query_grad: Tensor, geometry: Geometry, scale: float
) -> None:
    """Fill delta and query_grad; see ``query_gradient``. TMA must support all tensors' layouts."""
    work, tables, counts = query_walk(saved.inputs, geometry, TILE.rows)
    _hopper_query_kernel[(min(work, pipeline.multiprocessors(delta.device)),)](
        *(pipeline.descriptor(tensor, HALF.value) for tensor in (saved.inputs.query, output_grad)),
        *pipeline.sources(saved.inputs, TILE.columns), saved.output, saved.lse, delta, query_grad, *tables,
        *host.row_strides(saved.output, query_grad), work, *counts, *geometry.numbers, scale * host.LOG2_E, scale,
        DIM=query_grad.shape[3], BLOCK_N=TILE.columns, STAGES=TILE.stages, num_warps=TILE.warps,
    )  # fmt: skip


@replayed
@gluon.jit(do_not_specialize=host.INTEGERS)
def _hopper_query_kernel(
    d_query, d_do, d_key, d_value, d_compact_key, d_compact_value,
    p_output, p_lse, p_delta, p_dq, p_tiles, p_sequences,
    stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, n_work, n_batch_heads, heads, group, n_queries,
    sink, lag, keep, chunk, scale_log2, scale, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Allocate buffers and barriers, then run the three roles side by side."""
    # The queries and gradients of two tiles, for two consumers each.
    s_query = gl.allocate_shared_memory(d_query.dtype, [4, 1, 1, HALF, DIM], d_query.layout)
    s_do = gl.allocate_shared_memory(d_do.dtype, [4, 1, 1, HALF, DIM], d_do.layout)
    s_key = gl.allocate_shared_memory(d_key.dtype, [STAGES, 1, 1, BLOCK_N, DIM], d_key.layout)
    s_value = gl.allocate_shared_memory(d_value.dtype, [STAGES // 2, 1, 1, BLOCK_N, DIM], d_value.layout)
    full = barriers(4, 1), barriers(STAGES, 1), barriers(STAGES // 2, 1)
    free = barriers(4, 1), barriers(STAGES, 2), barriers(STAGES // 2, 2)
    fence_async_shared()

    buffers = (s_query, s_do, s_key, s_value)
    work = (p_tiles, p_sequences, n_work, n_batch_heads, heads)
    rule = (sink, lag, keep, chunk)
    rows = (p_output, p_lse, p_delta, stride_ob, stride_oh, stride_ot, n_queries, heads)
    results = (p_dq, stride_db, stride_dh, stride_dt, scale)
    queries = ((d_query, s_query), (d_do, s_do))
    sources = (d_key, d_compact_key, s_key), (d_value, d_compact_value, s_value)
    gl.warp_specialize(
        [
            (_consume, (0, buffers, full, free, work, rule, rows, results, scale_log2)),
            (_consume, (1, buffers, full, free, work, rule, rows, results, scale_log2)),
            (pipeline.produce_tiles, (queries, sources[0], sources[1], full, free, work, rule, group)),
        ],
        [4, 1],
        # As in forward_pipeline.py, the first consumer gets the rest of 504 registers.
        [240, 24],
    )


@gluon.jit
def _consume(WHICH: gl.constexpr, buffers, full, free, work, rule, rows, results, scale_log2):
    """A consumer: dQ of its half of every tile."""
    s_query, s_do, s_key, s_value = buffers
    query_full, key_full, value_full = full
    query_free, key_free, value_free = free
    n_keys: gl.constexpr = s_key.shape[0]
    n_values: gl.constexpr = s_value.shape[0]
    n_columns: gl.constexpr = s_key.shape[3]
    n_dim: gl.constexpr = s_key.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_dim, 16])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_columns, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    # Queries stay in registers: 64 x 64 products with both operands in shared memory would use all its bandwidth.
    query_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    dtype: gl.constexpr = s_query.dtype

    i_step = 0
    n_rounds = pipeline.count_rounds(work[2])
    i_b, i_h, p_sequence, i_first, i_low, i_high = pipeline.tile_of(0, work)
    n_full, n_all, cuts = pipeline.blocks_of(i_low, i_high, rule, n_columns)
    i_first += WHICH * HALF
    i_row = gl.load(p_sequence + device.QUERY_ROW) + i_first
    b_output, b_lse = _load_rows(i_b, i_h, i_row, i_first, i_low, i_high, rows, n_dim, score_layout)
    bounds = _bounds(p_sequence, i_first, rule, score_layout)
    mbarrier.wait(query_full.index(WHICH), 0)
    b_query = s_query.index(WHICH).reshape([HALF, n_dim]).load(query_layout)
    mbarrier.wait(key_full.index(0), 0)
    mbarrier.wait(value_full.index(0), 0)
    first = _queue_scores(b_query, s_do.index(WHICH), s_key.index(0), s_value.index(0))
    b_delta = _delta(b_output, s_do.index(WHICH), i_b, i_h, i_row, i_first, i_low, i_high, rows, score_layout)
    b_score, b_dp = warpgroup_mma_wait(0, deps=first)
    mbarrier.arrive(value_free.index(0))
    for i_round in range(n_rounds):
        i_query = (i_round % 2) * 2 + WHICH
        s_mine = s_do.index(i_query)
        b_dq = gl.zeros([HALF, n_dim], gl.float32, layout)
        # From this row on, keys of the block belong to another sequence or to none.
        n_own = n_columns
        b_p = gl.exp2(b_score * scale_log2 - b_lse[:, None])
        b_ds = b_p * (b_dp - b_delta[:, None])
        if n_full == 0:
            m_visible, n_own = _visible(0, n_full, cuts, i_first, bounds, n_columns, score_layout)
            b_ds = gl.where(m_visible, b_ds, 0.0)
        b_left = gl.convert_layout(b_ds.to(dtype), left_layout)
        if n_all > 1:
            i_buffer, i_parity = around(i_step + 1, n_keys)
            mbarrier.wait(key_full.index(i_buffer), i_parity)
            i_buffer, i_parity = around(i_step + 1, n_values)
            mbarrier.wait(value_full.index(i_buffer), i_parity)
        for i_block in range(1, n_full):
            queued = _queue(i_step, b_query, s_mine, b_left, b_dq, n_columns, s_key, s_value)
            b_ds, b_dq = _take(i_step, i_block + 1 < n_all, queued, b_lse, b_delta, scale_log2, full, free)
            b_left = gl.convert_layout(b_ds.to(dtype), left_layout)
            i_step += 1
        for i_block in range(gl.maximum(n_full, 1), n_all):
            queued = _queue(i_step, b_query, s_mine, b_left, b_dq, n_own, s_key, s_value)
            b_ds, b_dq = _take(i_step, i_block + 1 < n_all, queued, b_lse, b_delta, scale_log2, full, free)
            # After the products: before them, the mask's 64 bits per thread would be packed and unpacked in registers.
            m_visible, n_own = _visible(i_block, n_full, cuts, i_first, bounds, n_columns, score_layout)
            b_ds = gl.where(m_visible, b_ds, 0.0)
            b_left = gl.convert_layout(b_ds.to(dtype), left_layout)
            i_step += 1

        # The first scores of the next tile; after the last tile, useless products of old buffers.
        m_more = i_round + 1 < n_rounds
        i_buffer, i_parity = around(i_round + 1, 2)
        i_next = i_buffer * 2 + WHICH
        mbarrier.wait(query_full.index(i_next), i_parity, pred=m_more)
        b_query = s_query.index(i_next).reshape([HALF, n_dim]).load(query_layout)
        i_buffer, i_parity = around(i_step + 1, n_keys)
        mbarrier.wait(key_full.index(i_buffer), i_parity, pred=m_more)
        i_buffer, i_parity = around(i_step + 1, n_values)
        mbarrier.wait(value_full.index(i_buffer), i_parity, pred=m_more)
        queued = _queue(i_step, b_query, s_do.index(i_next), b_left, b_dq, n_own, s_key, s_value)
        # Look up the next tile's numbers while the tensor cores are busy.
        i_next_b, i_next_h, p_sequence, i_next_first, i_next_low, i_next_high = pipeline.tile_of(i_round + 1, work)
        n_full, n_all, cuts = pipeline.blocks_of(i_next_low, i_next_high, rule, n_columns)
        # The tile after the last one has no queries.
        i_next_high = gl.where(m_more, i_next_high, i_next_low)
        i_next_first += WHICH * HALF
        i_next_row = gl.load(p_sequence + device.QUERY_ROW) + i_next_first
        b_output, b_lse = _load_rows(
            i_next_b, i_next_h, i_next_row, i_next_first, i_next_low, i_next_high, rows, n_dim, score_layout
        )
        bounds = _bounds(p_sequence, i_next_first, rule, score_layout)
        b_score, b_dp, b_dq = warpgroup_mma_wait(0, deps=queued)
        mbarrier.arrive(key_free.index(i_step % n_keys))
        i_step += 1
        mbarrier.arrive(value_free.index(i_step % n_values), pred=m_more)
        s_rows = s_query.index(i_query).reshape([HALF, n_dim])
        _store(b_dq, s_rows, query_free.index(i_query), i_b, i_h, i_row, i_first, i_low, i_high, results)
        i_b, i_h, i_row, i_first = i_next_b, i_next_h, i_next_row, i_next_first
        i_low, i_high = i_next_low, i_next_high
        b_delta = _delta(b_output, s_do.index(i_next), i_b, i_h, i_row, i_first, i_low, i_high, rows, score_layout)


@gluon.jit
def _queue_scores(b_query, s_do, s_keys, s_values):
    """Queue scores and dP of a block."""
    n_columns: gl.constexpr = s_keys.shape[2]
    n_dim: gl.constexpr = s_keys.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_columns, 16])
    b_zero = gl.zeros([HALF, n_columns], gl.float32, layout)
    s_keys = s_keys.reshape([n_columns, n_dim]).permute([1, 0])
    b_score = warpgroup_mma(b_query, s_keys, b_zero, use_acc=False, is_async=True)
    s_values = s_values.reshape([n_columns, n_dim]).permute([1, 0])
    b_dp = warpgroup_mma(s_do.reshape([HALF, n_dim]), s_values, b_zero, use_acc=False, is_async=True)
    return b_score, b_dp


@gluon.jit
def _queue(i_step, b_query, s_do, b_left, b_dq, n_own, s_key, s_value):
    """Queue scores and dP of the next block, and this block's contribution to dQ."""
    n_keys: gl.constexpr = s_key.shape[0]
    n_values: gl.constexpr = s_value.shape[0]
    s_keys = s_key.index(i_step % n_keys).reshape([s_key.shape[3], s_key.shape[4]])
    if n_own < s_key.shape[3]:
        pipeline.clear(s_keys, n_own)
    b_score, b_dp = _queue_scores(
        b_query, s_do, s_key.index((i_step + 1) % n_keys), s_value.index((i_step + 1) % n_values)
    )
    b_dq = warpgroup_mma(b_left, s_keys, b_dq, is_async=True)
    return b_score, b_dp, b_dq


@gluon.jit
def _take(i_step, m_wait, queued, b_lse, b_delta, scale_log2, full, free):
    """Wait for the products of ``_queue``; returns the gradient of the next block's scores, and dQ so far."""
    _, key_full, value_full = full
    _, key_free, value_free = free
    n_keys: gl.constexpr = key_full.shape[0]
    n_values: gl.constexpr = value_full.shape[0]
    b_score, b_dp, b_dq = queued
    b_score = warpgroup_mma_wait(2, deps=[b_score])
    b_p = gl.exp2(b_score * scale_log2 - b_lse[:, None])
    # As in forward_pipeline.py, the loop of another wait is needed to keep the wait for a product in its place.
    i_buffer, i_parity = around(i_step + 2, n_keys)
    mbarrier.wait(key_full.index(i_buffer), i_parity, pred=m_wait)
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    mbarrier.arrive(value_free.index((i_step + 1) % n_values))
    b_ds = b_p * (b_dp - b_delta[:, None])
    i_buffer, i_parity = around(i_step + 2, n_values)
    mbarrier.wait(value_full.index(i_buffer), i_parity, pred=m_wait)
    b_dq = warpgroup_mma_wait(0, deps=[b_dq])
    mbarrier.arrive(key_free.index(i_step % n_keys))
    return b_ds, b_dq


@gluon.jit
def _bounds(p_sequence, i_first, rule, layout: gl.constexpr):
    """Where each query's compact columns end and raw ones start; the sequence's numbers of compact and raw rows."""
    sink, lag, keep, chunk = rule
    o_t = i_first + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    _, o_compact_to = pipeline.visible_range(o_t, sink, lag, keep, chunk, True)
    o_raw_from, _ = pipeline.visible_range(o_t, sink, lag, keep, chunk, False)
    n_compact = sink + gl.load(p_sequence + device.PARTITIONS) * keep
    return o_compact_to, o_raw_from, n_compact, gl.load(p_sequence + device.KEY_TO)


@gluon.jit
def _visible(i_block, n_full, cuts, i_first, bounds, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Which columns of a block the consumer's queries see, and how many of its rows belong to their sequence."""
    o_compact_to, o_raw_from, n_compact, n_raw = bounds
    m_compact, i_column = pipeline.block_at(i_block, n_full, cuts, BLOCK_N)
    o_t = i_first + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    o_from = gl.where(m_compact, 0, o_raw_from) - i_column
    o_to = gl.where(m_compact, o_compact_to, o_t + 1) - i_column
    o_column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    m_visible = (o_column[None, :] >= o_from[:, None]) & (o_column[None, :] < o_to[:, None])
    return m_visible, gl.where(m_compact, n_compact, n_raw) - i_column


@gluon.jit
def _load_rows(i_b, i_h, i_row, i_first, i_low, i_high, rows, DIM: gl.constexpr, score_layout: gl.constexpr):
    """Output [HALF, DIM] and log-sum-exp [HALF] of the consumer's queries; zero and infinity for rows without one."""
    p_output, p_lse, _, stride_ob, stride_oh, stride_ot, n_queries, heads = rows
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    o_row, m_row = pipeline.own_rows(i_first, i_low, i_high, layout)
    o_dim = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    p_output += i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh + i_row.to(gl.int64) * stride_ot
    p_rows = p_output + (o_row * stride_ot)[:, None] + o_dim[None, :]
    b_output = gl.load(p_rows, mask=m_row[:, None], other=0.0)
    o_row, m_row = pipeline.own_rows(i_first, i_low, i_high, score_layout)
    p_lse += (i_b * heads + i_h).to(gl.int64) * n_queries + i_row
    return b_output, gl.load(p_lse + o_row, mask=m_row, other=float("inf"))


@gluon.jit
def _delta(b_output, s_do, i_b, i_h, i_row, i_first, i_low, i_high, rows, score_layout: gl.constexpr):
    """Row sums of output x gradient, [HALF]; stores those of the queries in [low, high)."""
    _, _, p_delta, _, _, _, n_queries, heads = rows
    layout: gl.constexpr = b_output.type.layout
    b_do = s_do.reshape(b_output.shape).load(layout)
    b_delta = gl.sum(b_output.to(gl.float32) * b_do.to(gl.float32), axis=1)
    o_row, m_row = pipeline.own_rows(i_first, i_low, i_high, layout)
    p_delta += (i_b * heads + i_h).to(gl.int64) * n_queries + i_row
    gl.store(p_delta + o_row, b_delta, mask=m_row)
    return gl.convert_layout(b_delta, gl.SliceLayout(1, score_layout))


@gluon.jit
def _store(b_dq, s_rows, query_free, i_b, i_h, i_row, i_first, i_low, i_high, results):
    """Store the rows of the queries in [low, high) through the buffer of the queries, and free that buffer."""
    p_dq, stride_db, stride_dh, stride_dt, scale = results
    n_dim: gl.constexpr = s_rows.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // n_dim, n_dim // 8], [4, 1], [1, 0])
    s_rows.store((b_dq * scale).to(s_rows.dtype))
    b_rows = s_rows.load(layout)
    fence_async_shared()
    pipeline.thread_barrier()
    mbarrier.arrive(query_free)
    o_row, m_row = pipeline.own_rows(i_first, i_low, i_high, layout)
    o_dim = gl.arange(0, n_dim, gl.SliceLayout(0, layout))
    p_dq += i_b.to(gl.int64) * stride_db + i_h.to(gl.int64) * stride_dh + i_row.to(gl.int64) * stride_dt
    gl.store(p_dq + (o_row * stride_dt)[:, None] + o_dim[None, :], b_rows, mask=m_row[:, None])
