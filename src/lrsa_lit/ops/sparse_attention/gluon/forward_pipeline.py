"""The attention forward on Hopper, in Gluon: one warp loads, two warpgroups take turns at the tensor cores.

One program per multiprocessor processes many tiles of 128 queries. Its *producer* warp copies queries, keys and values
into shared memory and runs ahead as far as there are buffers, also across tiles. Its two *consumers* own half a tile
each. While one computes its softmax, the products of the other keep the tensor cores busy; a *turn* that they pass to
each other keeps them out of step. A consumer queues the next block's scores before the product P V of the current
block, also across tiles.

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

TILE = host.Tile(128, 128, 4, 2)
"""The number of warps is that of one consumer."""


def launch(inputs: host.Inputs, output: Tensor, lse: Tensor, geometry: Geometry, scale: float) -> None:
    """Fill output and log-sum-exp; see ``forward_kernel.attend_forward``. TMA must support all tensors' layouts."""
    work, tables, counts = query_walk(inputs, geometry, TILE.rows)
    _hopper_forward_kernel[(min(work, pipeline.multiprocessors(output.device)),)](
        pipeline.descriptor(inputs.query, HALF.value), *pipeline.sources(inputs, TILE.columns), output, lse, *tables,
        *host.row_strides(output), work, *counts, *geometry.numbers, scale * host.LOG2_E,
        DIM=output.shape[3], BLOCK_N=TILE.columns, STAGES=TILE.stages, num_warps=TILE.warps,
    )  # fmt: skip


@replayed
@gluon.jit(do_not_specialize=host.INTEGERS)
def _hopper_forward_kernel(
    d_query, d_key, d_value, d_compact_key, d_compact_value, p_output, p_lse, p_tiles, p_sequences,
    stride_ob, stride_oh, stride_ot, n_work, n_batch_heads, heads, group, n_queries,
    sink, lag, keep, chunk, scale_log2, DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Allocate buffers and barriers, then run the three roles side by side."""
    # The queries of two tiles, for two consumers each.
    s_query = gl.allocate_shared_memory(d_query.dtype, [4, 1, 1, HALF, DIM], d_query.layout)
    s_key = gl.allocate_shared_memory(d_key.dtype, [STAGES, 1, 1, BLOCK_N, DIM], d_key.layout)
    s_value = gl.allocate_shared_memory(d_value.dtype, [STAGES, 1, 1, BLOCK_N, DIM], d_value.layout)
    full = barriers(4, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    free = barriers(4, 1), barriers(STAGES, 2), barriers(STAGES, 2)
    turn = barriers(2, 1)
    fence_async_shared()

    buffers = (s_query, s_key, s_value)
    work = (p_tiles, p_sequences, n_work, n_batch_heads, heads)
    rule = (sink, lag, keep, chunk)
    results = (p_output, p_lse, stride_ob, stride_oh, stride_ot, n_queries)
    queries = ((d_query, s_query),)
    sources = (d_key, d_compact_key, s_key), (d_value, d_compact_value, s_value)
    gl.warp_specialize(
        [
            (_consume, (0, buffers, full, free, turn, work, rule, results, scale_log2)),
            (_consume, (1, buffers, full, free, turn, work, rule, results, scale_log2)),
            (pipeline.produce_tiles, (queries, sources[0], sources[1], full, free, work, rule, group)),
        ],
        [4, 1],
        # The warpgroups share 504 registers per thread; the first consumer gets the remaining 240.
        [240, 24],
    )


@gluon.jit
def _consume(WHICH: gl.constexpr, buffers, full, free, turn, work, rule, results, scale_log2):
    """A consumer: the attention of its half of every tile."""
    s_query, s_key = buffers[:2]
    query_full, key_full = full[:2]
    query_free, key_free, value_free = free
    n_stages: gl.constexpr = s_key.shape[0]
    n_columns: gl.constexpr = s_key.shape[3]
    n_dim: gl.constexpr = s_key.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_dim, 16])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_columns, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    dtype: gl.constexpr = s_query.dtype

    i_step = 0
    n_rounds = pipeline.count_rounds(work[2])
    i_b, i_h, p_sequence, i_first, i_low, i_high = pipeline.tile_of(0, work)
    n_full, n_all, cuts = pipeline.blocks_of(i_low, i_high, rule, n_columns)
    mbarrier.wait(query_full.index(WHICH), 0)
    mbarrier.wait(key_full.index(0), 0)
    s_keys = s_key.index(0).reshape([n_columns, n_dim]).permute([1, 0])
    # [HALF, n_columns]
    b_score = gl.zeros([HALF, n_columns], gl.float32, score_layout)
    b_score = warpgroup_mma(s_query.index(WHICH).reshape([HALF, n_dim]), s_keys, b_score, use_acc=False, is_async=True)
    b_score = warpgroup_mma_wait(0, deps=[b_score])
    mbarrier.arrive(key_free.index(0))
    for i_round in range(n_rounds):
        i_first += WHICH * HALF
        i_query = (i_round % 2) * 2 + WHICH
        b_output = gl.zeros([HALF, n_dim], gl.float32, layout)
        b_sum = gl.zeros([HALF], gl.float32, row_layout)
        b_max = gl.full([HALF], device.LOWEST, gl.float32, row_layout)
        # From this row on, values of the block belong to another sequence or to none.
        n_own = n_columns
        if n_full == 0:
            m_visible, n_own = _visible(0, n_full, cuts, p_sequence, i_first, rule, n_columns, score_layout)
            b_score = gl.where(m_visible, b_score, float("-inf"))
        b_p, b_sum, b_max, _ = _softmax(b_score, b_sum, b_max, scale_log2)
        b_left = gl.convert_layout(b_p.to(dtype), left_layout)
        if n_all > 1:
            i_buffer, i_parity = around(i_step + 1, n_stages)
            mbarrier.wait(key_full.index(i_buffer), i_parity)
        for i_block in range(1, n_full):
            b_score, b_output = _queue(WHICH, i_query, i_step, b_left, b_output, n_columns, buffers, full, free, turn)
            b_p, b_sum, b_max, b_decay = _softmax(b_score, b_sum, b_max, scale_log2)
            b_output = _take(i_step, i_block + 1 < n_all, b_output, b_decay, key_full, value_free)
            b_left = gl.convert_layout(b_p.to(dtype), left_layout)
            i_step += 1
        for i_block in range(gl.maximum(n_full, 1), n_all):
            b_score, b_output = _queue(WHICH, i_query, i_step, b_left, b_output, n_own, buffers, full, free, turn)
            m_visible, n_own = _visible(i_block, n_full, cuts, p_sequence, i_first, rule, n_columns, score_layout)
            b_score = gl.where(m_visible, b_score, float("-inf"))
            b_p, b_sum, b_max, b_decay = _softmax(b_score, b_sum, b_max, scale_log2)
            b_output = _take(i_step, i_block + 1 < n_all, b_output, b_decay, key_full, value_free)
            b_left = gl.convert_layout(b_p.to(dtype), left_layout)
            i_step += 1
        mbarrier.arrive(query_free.index(i_query))

        # The first scores of the next tile; after the last tile, a useless product of old buffers.
        m_more = i_round + 1 < n_rounds
        i_buffer, i_parity = around(i_round + 1, 2)
        i_query = i_buffer * 2 + WHICH
        mbarrier.wait(query_full.index(i_query), i_parity, pred=m_more)
        i_buffer, i_parity = around(i_step + 1, n_stages)
        mbarrier.wait(key_full.index(i_buffer), i_parity, pred=m_more)
        b_score, b_output = _queue(WHICH, i_query, i_step, b_left, b_output, n_own, buffers, full, free, turn)
        # Look up the next tile's numbers while the tensor cores are busy.
        b_factor = 1.0 / b_sum
        b_lse = b_max * scale_log2 + gl.log2(b_sum)
        i_row = gl.load(p_sequence + device.QUERY_ROW)
        i_next_b, i_next_h, p_sequence, i_next_first, i_next_low, i_next_high = pipeline.tile_of(i_round + 1, work)
        n_full, n_all, cuts = pipeline.blocks_of(i_next_low, i_next_high, rule, n_columns)
        b_output = _take(i_step, False, b_output, b_factor, key_full, value_free)
        i_step += 1
        _store(b_output.to(dtype), b_lse, i_b, i_h, i_row, i_first, i_low, i_high, results, work[4])
        i_b, i_h, i_first, i_low, i_high = i_next_b, i_next_h, i_next_first, i_next_low, i_next_high


@gluon.jit
def _queue(WHICH: gl.constexpr, i_query, i_step, b_left, b_output, n_own, buffers, full, free, turn):
    """Queue the next block's scores and this block's product P V; wait for the scores."""
    s_query, s_key, s_value = buffers
    n_stages: gl.constexpr = s_key.shape[0]
    n_columns: gl.constexpr = s_key.shape[3]
    n_dim: gl.constexpr = s_key.shape[4]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_columns, 16])
    i_next, _ = around(i_step + 1, n_stages)
    i_buffer, i_parity = around(i_step, n_stages)
    s_mine = s_query.index(i_query).reshape([HALF, n_dim])
    s_keys = s_key.index(i_next).reshape([n_columns, n_dim]).permute([1, 0])
    s_values = s_value.index(i_buffer).reshape([n_columns, n_dim])
    # The first consumer has the first turn without an arrival.
    mbarrier.wait(turn.index(WHICH), (i_step & 1) ^ (1 - WHICH))
    b_score = gl.zeros([HALF, n_columns], gl.float32, score_layout)
    b_score = warpgroup_mma(s_mine, s_keys, b_score, use_acc=False, is_async=True)
    mbarrier.wait(full[2].index(i_buffer), i_parity)
    if n_own < n_columns:
        pipeline.clear(s_values, n_own)
    b_output = warpgroup_mma(b_left, s_values, b_output, is_async=True)
    mbarrier.arrive(turn.index(1 - WHICH))
    b_score = warpgroup_mma_wait(1, deps=[b_score])
    mbarrier.arrive(free[1].index(i_next))
    return b_score, b_output


@gluon.jit
def _take(i_step, m_wait, b_output, b_factor, key_full, value_free):
    """Wait for the product P V, and scale its rows."""
    n_stages: gl.constexpr = value_free.shape[0]
    layout: gl.constexpr = gl.SliceLayout(1, b_output.type.tensor_type.layout)
    # ptxas moves the wait for a product before the softmax that should overlap it, but not across the loop of another
    # wait. Therefore the wait for the keys of the block after the next one is here, not where they are needed.
    i_next, i_parity = around(i_step + 2, n_stages)
    mbarrier.wait(key_full.index(i_next), i_parity, pred=m_wait)
    b_output = warpgroup_mma_wait(0, deps=[b_output])
    mbarrier.arrive(value_free.index(around(i_step, n_stages)[0]))
    return b_output * gl.convert_layout(b_factor, layout)[:, None]


@gluon.jit
def _softmax(b_score, b_sum, b_max, scale_log2):
    """One step of the online softmax, as in ``forward_kernel.attend_block``."""
    b_top = gl.maximum(b_max, gl.max(b_score, axis=1))
    b_p = gl.exp2((b_score - b_top[:, None]) * scale_log2)
    b_decay = gl.exp2((b_max - b_top) * scale_log2)
    return b_p, b_sum * b_decay + gl.sum(b_p, axis=1), b_top, b_decay


@gluon.jit
def _visible(i_block, n_full, cuts, p_sequence, i_first, rule, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Which columns of a block the consumer's queries see, and how many of its rows belong to their sequence."""
    sink, lag, keep, chunk = rule
    m_compact, i_column = pipeline.block_at(i_block, n_full, cuts, BLOCK_N)
    o_t = i_first + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    if m_compact:
        o_from, o_to = pipeline.visible_range(o_t, sink, lag, keep, chunk, True)
        n_rows = sink + gl.load(p_sequence + device.PARTITIONS) * keep
    else:
        o_from, o_to = pipeline.visible_range(o_t, sink, lag, keep, chunk, False)
        n_rows = gl.load(p_sequence + device.KEY_TO)
    o_column = i_column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    m_visible = (o_column[None, :] >= o_from[:, None]) & (o_column[None, :] < o_to[:, None])
    return m_visible, n_rows - i_column


@gluon.jit
def _store(b_output, b_lse, i_b, i_h, i_row, i_first, i_low, i_high, results, heads):
    """Store the rows of the queries in [low, high), of output and log-sum-exp."""
    p_output, p_lse, stride_ob, stride_oh, stride_ot, n_queries = results
    n_dim: gl.constexpr = b_output.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // n_dim, n_dim // 8], [4, 1], [1, 0])
    o_row, m_row = pipeline.own_rows(i_first, i_low, i_high, layout)
    o_dim = gl.arange(0, n_dim, gl.SliceLayout(0, layout))
    i_row = (i_row + i_first).to(gl.int64)
    p_output += i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh + i_row * stride_ot
    p_rows = p_output + (o_row * stride_ot)[:, None] + o_dim[None, :]
    gl.store(p_rows, gl.convert_layout(b_output, layout), mask=m_row[:, None])
    score_layout: gl.constexpr = b_lse.type.layout.parent
    o_row, m_row = pipeline.own_rows(i_first, i_low, i_high, score_layout)
    p_lse += (i_b * heads + i_h).to(gl.int64) * n_queries + i_row
    gl.store(p_lse + o_row, b_lse, mask=m_row)
