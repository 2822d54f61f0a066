"""dK and dV of the compact buffer on Hopper, in Gluon: one warp loads, two warpgroups own half a tile of keys each.

One program per multiprocessor processes tiles of 128 keys. Its *producer* warp loads a tile's keys and values once, and
blocks of queries and output gradients, with their log-sum-exps and deltas, as far ahead as there are buffers. Its two
*consumers* add each block's contribution to dK and dV of their 64 keys, in registers. The rows of scores are keys, so
that P and dS can directly be left operands of the next products. The product dP runs while a consumer computes P, and
dV while it computes dS. At the end of a block, while it waits for dK, the other consumer's products keep the tensor
cores busy.

Names in the kernel are explained in pipeline.py.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
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
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, sequence_table

TILE = host.Tile(128, 64, 4, 4)
"""The number of warps is that of one consumer."""


def launch(
    saved: host.Saved, output_grad: Tensor, delta: Tensor, partial: tuple[Tensor, Tensor], table: Tensor,
    geometry: Geometry, scale: float
) -> None:  # fmt: skip
    """Fill ``partial``; see ``key_gradient_kernel.compact_gradient``. TMA must support all tensors' layouts."""
    query, _, _, compact_key, compact_value = saved.inputs
    batch, query_heads, queries, dim = query.shape
    heads, rows = compact_key.shape[1:3]
    splits = partial[0].shape[0]
    n_work = table.shape[0] * batch * heads * splits
    _hopper_key_kernel[(min(n_work, pipeline.multiprocessors(query.device)),)](
        *(pipeline.descriptor(tensor, HALF.value) for tensor in (compact_key, compact_value)),
        *(pipeline.descriptor(tensor, TILE.columns) for tensor in (query, output_grad)),
        saved.lse, delta, *partial, table, sequence_table(geometry, query.device),
        n_work, batch * heads, heads, query_heads // heads, splits, queries, rows,
        *geometry.numbers, scale * host.LOG2_E, scale,
        DIM=dim, BLOCK_M=TILE.columns, STAGES=TILE.stages, num_warps=TILE.warps,
    )  # fmt: skip


@replayed
@gluon.jit(do_not_specialize=host.INTEGERS)
def _hopper_key_kernel(
    d_key, d_value, d_query, d_do, p_lse, p_delta, p_dk, p_dv, p_tiles, p_sequences,
    n_work, n_batch_heads, heads, group, n_splits, n_queries, n_rows,
    sink, lag, keep, chunk, scale_log2, scale, DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Allocate buffers and barriers, then run the three roles side by side."""
    # The keys and values of one tile, for two consumers each.
    s_key = gl.allocate_shared_memory(d_key.dtype, [2, 1, 1, HALF, DIM], d_key.layout)
    s_value = gl.allocate_shared_memory(d_value.dtype, [2, 1, 1, HALF, DIM], d_value.layout)
    s_query = gl.allocate_shared_memory(d_query.dtype, [STAGES, 1, 1, BLOCK_M, DIM], d_query.layout)
    s_do = gl.allocate_shared_memory(d_do.dtype, [STAGES, 1, 1, BLOCK_M, DIM], d_do.layout)
    scalar_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], scalar_layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], scalar_layout)
    # A block is full when TMA's bytes have arrived and each of the producer's 32 threads has finished its own copies.
    stages = barriers(2, 1), barriers(2, 1), barriers(STAGES, 33), barriers(STAGES, 2)
    fence_async_shared()

    buffers = (s_key, s_value, s_query, s_do, s_lse, s_delta)
    work = (p_tiles, p_sequences, n_work, n_batch_heads, heads, group, n_splits)
    rule = (sink, lag, keep, chunk)
    scalars = (p_lse, p_delta, n_queries)
    results = (p_dk, p_dv, n_rows, scale)
    descriptors = (d_key, d_value, d_query, d_do)
    gl.warp_specialize(
        [
            (_consume, (0, buffers, stages, work, rule, results, scale_log2)),
            (_consume, (1, buffers, stages, work, rule, results, scale_log2)),
            (_produce, (buffers, stages, descriptors, scalars, work, rule)),
        ],
        [4, 1],
        # The warpgroups share 504 registers per thread; the first consumer gets the remaining 240.
        [240, 24],
    )


@gluon.jit
def _tile(i_round, work):
    """Batch x head, split, row of the sequence table, and first column of a round's tile."""
    p_tiles, p_sequences, _, n_batch_heads, _, _, n_splits = work
    i_work = i_round * gl.num_programs(0) + pipeline.place(i_round)
    n_programs = n_batch_heads * n_splits
    p_tile = p_tiles + i_work // n_programs * 2
    i_program = i_work % n_programs
    p_sequence = p_sequences + gl.load(p_tile) * device.COLUMNS
    return i_program // n_splits, i_program % n_splits, p_sequence, gl.load(p_tile + 1)


@gluon.jit
def _blocks(p_sequence, i_first, work, rule, BLOCK_M: gl.constexpr):
    """The blocks of queries that see the tile: numbers of full and of masked blocks of all heads; their bounds.

    There is at least one block, because every row in the buffer is seen by some query.
    """
    sink, lag, keep, chunk = rule
    i_end_row = gl.minimum(i_first + 2 * HALF, sink + gl.load(p_sequence + device.PARTITIONS) * keep)
    i_stop = gl.load(p_sequence + device.QUERY_TO)
    i_start = pipeline.first_seen_by(i_first, sink, lag, keep, chunk, True)
    i_start = gl.maximum(i_start, gl.load(p_sequence + device.QUERY_FROM))
    i_full_from = pipeline.first_seen_by(i_end_row - 1, sink, lag, keep, chunk, True)
    i_begin, i_end, n_masked = pipeline.split_blocks(i_start, i_full_from, i_stop, i_stop, BLOCK_M)
    n_group = work[5] // work[6]
    n_full = (i_end - i_begin) // BLOCK_M
    n_masked = n_masked // BLOCK_M
    return n_group * n_full, n_group * n_masked, (n_full, n_masked, i_start, i_begin, i_end, i_stop)


@gluon.jit
def _full_block(i_block, cuts, BLOCK_M: gl.constexpr):
    """The head of a full block of the tile, and the block's first query.

    Blocks run backwards, so that programs that run together start at the same queries, the last ones, and share them in
    L2.
    """
    n_full, _, _, _, i_end, _ = cuts
    return i_block // n_full, i_end - (i_block % n_full + 1) * BLOCK_M


@gluon.jit
def _partial_block(i_block, cuts, BLOCK_M: gl.constexpr):
    """The head of a masked block of the tile, and the block's first query."""
    _, n_masked, i_start, i_begin, i_end, _ = cuts
    return i_block // n_masked, pipeline.masked_block(i_block % n_masked * BLOCK_M, i_start, i_begin, i_end)


@gluon.jit
def _produce(buffers, stages, descriptors, scalars, work, rule):
    """The producer: load data in the order in which the consumers read it."""
    s_key, s_value, s_query, s_do, s_lse, s_delta = buffers
    key_full, key_free, block_full, block_free = stages
    d_key, d_value, d_query, d_do = descriptors
    p_lse, p_delta, n_queries = scalars
    n_stages: gl.constexpr = s_query.shape[0]
    n_block: gl.constexpr = s_query.shape[3]
    o_m = gl.arange(0, n_block, gl.BlockedLayout([1], [32], [1], [0]))
    i_step = 0
    for i_round in range(pipeline.count_rounds(work[2])):
        i_bh, i_split, p_sequence, i_first = _tile(i_round, work)
        n_full, n_masked, cuts = _blocks(p_sequence, i_first, work, rule, n_block)
        heads, group = work[4], work[5]
        i_b, i_h = i_bh // heads, i_bh % heads
        i_row = gl.load(p_sequence + device.COMPACT_ROW) + i_first
        for i_half in gl.static_range(2):
            b_full = key_full.index(i_half)
            mbarrier.wait(key_free.index(i_half), (i_round & 1) ^ 1)
            mbarrier.expect(b_full, d_key.block_type.nbytes + d_value.block_type.nbytes)
            i_half_row = i_row + i_half * HALF
            pipeline.load_block(d_key, [i_b, i_h, i_half_row, 0], b_full, s_key.index(i_half))
            pipeline.load_block(d_value, [i_b, i_h, i_half_row, 0], b_full, s_value.index(i_half))
        i_query_row = gl.load(p_sequence + device.QUERY_ROW)
        i_group = i_h * group + i_split * (group // work[6])
        for i_block in range(n_full + n_masked):
            if i_block < n_full:
                i_head, i_m = _full_block(i_block, cuts, n_block)
            else:
                i_head, i_m = _partial_block(i_block - n_full, cuts, n_block)
            i_head += i_group
            i_buffer, i_parity = around(i_step, n_stages)
            b_full = block_full.index(i_buffer)
            mbarrier.wait(block_free.index(i_buffer), i_parity ^ 1)
            mbarrier.expect(b_full, d_query.block_type.nbytes + d_do.block_type.nbytes)
            i_m_row = i_query_row + i_m
            pipeline.load_block(d_query, [i_b, i_head, i_m_row, 0], b_full, s_query.index(i_buffer))
            pipeline.load_block(d_do, [i_b, i_head, i_m_row, 0], b_full, s_do.index(i_buffer))
            # Not by TMA, which needs an alignment of 16 bytes: rows can start anywhere.
            i_scalar = (i_b * heads * group + i_head).to(gl.int64) * n_queries + i_m_row
            m_m = i_m + o_m < cuts[5]
            pipeline.load_scalars(s_lse.index(i_buffer), p_lse + i_scalar + o_m, mask=m_m)
            pipeline.load_scalars(s_delta.index(i_buffer), p_delta + i_scalar + o_m, mask=m_m)
            async_copy.mbarrier_arrive(b_full, increment_count=False)
            i_step += 1


@gluon.jit
def _consume(WHICH: gl.constexpr, buffers, stages, work, rule, results, scale_log2):
    """A consumer: dK and dV of its half of every tile."""
    s_key, s_value, s_query = buffers[:3]
    key_full, key_free, block_full, block_free = stages
    n_stages: gl.constexpr = s_query.shape[0]
    n_block: gl.constexpr = s_query.shape[3]
    n_dim: gl.constexpr = s_query.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_dim, 16])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_block, 16])
    s_keys = s_key.index(WHICH).reshape([HALF, n_dim])
    s_values = s_value.index(WHICH).reshape([HALF, n_dim])
    sink, lag, keep, chunk = rule
    i_step = 0
    for i_round in range(pipeline.count_rounds(work[2])):
        i_bh, i_split, p_sequence, i_first = _tile(i_round, work)
        n_full, n_masked, cuts = _blocks(p_sequence, i_first, work, rule, n_block)
        b_dk = gl.zeros([HALF, n_dim], gl.float32, layout)
        b_dv = gl.zeros([HALF, n_dim], gl.float32, layout)
        mbarrier.wait(key_full.index(WHICH), i_round & 1)
        for _ in range(n_full):
            i_buffer, i_parity = around(i_step, n_stages)
            mbarrier.wait(block_full.index(i_buffer), i_parity)
            b_dk, b_dv = _step(i_buffer, b_dk, b_dv, s_keys, s_values, buffers, scale_log2, None, 0)
            mbarrier.arrive(block_free.index(i_buffer))
            i_step += 1
        o_n = i_first + WHICH * HALF + gl.arange(0, HALF, gl.SliceLayout(1, score_layout))
        o_seen = pipeline.first_seen_by(o_n, sink, lag, keep, chunk, True)
        for i_block in range(n_masked):
            i_m = _partial_block(i_block, cuts, n_block)[1]
            # From this row on, queries of the block belong to another sequence or to none.
            n_own = cuts[5] - i_m
            i_buffer, i_parity = around(i_step, n_stages)
            mbarrier.wait(block_full.index(i_buffer), i_parity)
            b_dk, b_dv = _step(i_buffer, b_dk, b_dv, s_keys, s_values, buffers, scale_log2, o_seen - i_m, n_own)
            mbarrier.arrive(block_free.index(i_buffer))
            i_step += 1
        mbarrier.arrive(key_free.index(WHICH))
        _store(b_dk * results[3], b_dv, WHICH, i_bh, i_split, p_sequence, i_first, work, rule, results)


@gluon.jit
def _step(i_buffer, b_dk, b_dv, s_keys, s_values, buffers, scale_log2, o_seen, n_own):
    """Add the contribution of one block of queries to dK (before the scale) and dV, as in ``_key_block``.

    The block's queries in [``o_seen[n]``, ``n_own``) see key n; all of them do if ``o_seen`` is None.
    """
    s_query, s_do, s_lse, s_delta = buffers[2:]
    n_block: gl.constexpr = s_query.shape[3]
    n_dim: gl.constexpr = s_query.shape[4]
    dtype: gl.constexpr = s_query.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n_block, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, b_dk.type.layout, 2)
    column_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    s_queries = s_query.index(i_buffer).reshape([n_block, n_dim])
    s_dos = s_do.index(i_buffer).reshape([n_block, n_dim])
    if o_seen is not None and n_own < n_block:
        pipeline.clear(s_queries, n_own)
        pipeline.clear(s_dos, n_own)
    # [HALF, n_block]
    b_zero = gl.zeros([HALF, n_block], gl.float32, score_layout)
    b_score = warpgroup_mma(s_keys, s_queries.permute([1, 0]), b_zero, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(s_values, s_dos.permute([1, 0]), b_zero, use_acc=False, is_async=True)
    b_lse = s_lse.index(i_buffer).load(column_layout)
    b_score = warpgroup_mma_wait(1, deps=[b_score])
    b_p = gl.exp2(b_score * scale_log2 - b_lse[None, :])
    if o_seen is not None:
        o_m = gl.arange(0, n_block, column_layout)
        b_p = gl.where((o_m[None, :] >= o_seen[:, None]) & (o_m < n_own)[None, :], b_p, 0.0)
    b_left = gl.convert_layout(b_p.to(dtype), left_layout)
    b_dv = warpgroup_mma(b_left, s_dos, b_dv, is_async=True)
    b_delta = s_delta.index(i_buffer).load(column_layout)
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    b_left = gl.convert_layout((b_p * (b_dp - b_delta[None, :])).to(dtype), left_layout)
    b_dk = warpgroup_mma(b_left, s_queries, b_dk, is_async=True)
    return warpgroup_mma_wait(0, deps=[b_dk, b_dv])


@gluon.jit
def _store(b_dk, b_dv, WHICH: gl.constexpr, i_bh, i_split, p_sequence, i_first, work, rule, results):
    """Store the rows of the consumer's keys that belong to the sequence."""
    p_dk, p_dv, n_rows, _ = results
    sink, _, keep, _ = rule
    n_dim: gl.constexpr = b_dk.shape[1]
    layout: gl.constexpr = b_dk.type.layout
    o_row = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    o_dim = gl.arange(0, n_dim, gl.SliceLayout(0, layout))
    i_first += WHICH * HALF
    m_row = i_first + o_row < sink + gl.load(p_sequence + device.PARTITIONS) * keep
    i_row = (i_split * work[3] + i_bh).to(gl.int64) * n_rows + gl.load(p_sequence + device.COMPACT_ROW) + i_first
    # Store directly from the products' layout: four threads fill a sector, and shared memory has no room.
    o_rows = (o_row * n_dim)[:, None] + o_dim[None, :]
    gl.store(p_dk + i_row * n_dim + o_rows, b_dk, mask=m_row[:, None])
    gl.store(p_dv + i_row * n_dim + o_rows, b_dv, mask=m_row[:, None])
