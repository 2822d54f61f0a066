"""Shared by the Hopper kernels: how a program iterates over its tiles, and the blocks of keys of a tile of queries.

Prefixes of kernel locals are those of device_functions.py, plus s for a buffer in shared memory. ``*_full`` and
``*_free`` are the barriers that pass a buffer to the consumers and back; their phases count how often it was reused.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lrsa_lit.ops.sparse_attention.triton import device_functions as device
from lrsa_lit.ops.sparse_attention.triton import host_functions as host

HALF = gl.constexpr(64)
"""The number of queries of a consumer: the rows of one warpgroup's product."""

visible_range = gluon.jit(device.visible_range.fn)
split_blocks = gluon.jit(device.split_blocks.fn)
masked_block = gluon.jit(device.masked_block.fn)
first_seen_by = gluon.jit(device.first_seen_by.fn)

# Triton 3.7 and 3.8 have renamed them.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
load_scalars = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors, and so of programs: one runs on each."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor for blocks of rows of one head of (B, H, T, D)."""
    return host.descriptor(TensorDescriptor, tensor, [1, 1, rows, tensor.shape[3]], layout=_ROWS)


def sources(inputs: host.Inputs, columns: int) -> list[TensorDescriptor]:
    """Descriptors for blocks of raw and compact keys and values; for an empty compact buffer they are never used."""
    raw, compact = inputs[1:3], inputs[3:]
    return [descriptor(tensor, columns) for tensor in (*raw, *(compact if compact[0].numel() else raw))]


@gluon.jit
def place(i_round):
    """The index of this program's tile in a round; the order alternates, because tiles are sorted by length."""
    return gl.where(i_round % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@gluon.jit
def count_rounds(n_work):
    """The number of tiles of this program."""
    n_whole = n_work // gl.num_programs(0)
    return n_whole + (place(n_whole) < n_work % gl.num_programs(0)).to(gl.int32)


@gluon.jit
def tile_of(i_round, work):
    """Batch, query head, row of the sequence table, first position, and the tile's queries [low, high)."""
    p_tiles, p_sequences, n_work, n_batch_heads, heads = work
    # The next tile is looked up even if there is none, so limit its index.
    i_work = gl.minimum(i_round * gl.num_programs(0) + place(i_round), n_work - 1)
    i_tile, i_bh = i_work // n_batch_heads, i_work % n_batch_heads
    p_sequence = p_sequences + gl.load(p_tiles + i_tile * 2) * device.COLUMNS
    i_first = gl.load(p_tiles + i_tile * 2 + 1)
    i_low = gl.maximum(i_first, gl.load(p_sequence + device.QUERY_FROM))
    i_high = gl.minimum(i_first + 2 * HALF, gl.load(p_sequence + device.QUERY_TO))
    return i_bh // heads, i_bh % heads, p_sequence, i_first, i_low, i_high


@gluon.jit
def blocks_of(i_low, i_high, rule, BLOCK_N: gl.constexpr):
    """The blocks of a tile: the numbers of full and of all blocks, of compact full and compact masked ones; raw bounds.

    Full blocks come first; in both kinds, compact blocks come before raw ones.
    """
    sink, lag, keep, chunk = rule
    _, i_full_to = visible_range(i_low, sink, lag, keep, chunk, True)
    _, i_stop = visible_range(i_high - 1, sink, lag, keep, chunk, True)
    n_compact_full = i_full_to // BLOCK_N
    n_compact_masked = (i_stop - n_compact_full * BLOCK_N + BLOCK_N - 1) // BLOCK_N
    i_start, i_full_to = visible_range(i_low, sink, lag, keep, chunk, False)
    i_full_from, i_stop = visible_range(i_high - 1, sink, lag, keep, chunk, False)
    i_begin, i_end, n_masked = split_blocks(i_start, i_full_from, i_full_to, i_stop, BLOCK_N)
    n_full = n_compact_full + (i_end - i_begin) // BLOCK_N
    n_all = n_full + n_compact_masked + n_masked // BLOCK_N
    return n_full, n_all, (n_compact_full, n_compact_masked, i_start, i_begin, i_end)


@gluon.jit
def block_at(i_block, n_full, cuts, BLOCK_N: gl.constexpr):
    """Whether a block of the tile is in the compact buffer, and its first column there or in the raw tokens."""
    n_compact_full, n_compact_masked, i_start, i_begin, i_end = cuts
    i_masked = i_block - n_full
    i_raw = masked_block((i_masked - n_compact_masked) * BLOCK_N, i_start, i_begin, i_end)
    m_full = i_block < n_full
    m_compact = gl.where(m_full, i_block < n_compact_full, i_masked < n_compact_masked)
    i_compact = gl.where(m_full, i_block, n_compact_full + i_masked) * BLOCK_N
    i_raw = gl.where(m_full, i_begin + (i_block - n_compact_full) * BLOCK_N, i_raw)
    return m_compact, gl.where(m_compact, i_compact, i_raw)


@gluon.jit
def around(i_step, STAGES: gl.constexpr):
    """The buffer of a step, and the parity of how often it was reused."""
    return i_step % STAGES, (i_step // STAGES) & 1


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for ARRIVALS arrivals."""
    each = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(each.index(i), count=ARRIVALS)
    return each


@gluon.jit
def _copy_block(i_step, i_from, m_compact, d_raw, d_compact, s_rows, full, free):
    """Copy a block of the raw or the compact source into the step's buffer, once this is free."""
    i_buffer, i_parity = around(i_step, s_rows.shape[0])
    mbarrier.wait(free.index(i_buffer), i_parity ^ 1)
    mbarrier.expect(full.index(i_buffer), d_raw.block_type.nbytes)
    if m_compact:
        load_block(d_compact, i_from, full.index(i_buffer), s_rows.index(i_buffer))
    else:
        load_block(d_raw, i_from, full.index(i_buffer), s_rows.index(i_buffer))


@gluon.jit
def produce_tiles(queries, keys, values, full, free, work, rule, group):
    """The producer for tiles of queries: load data in the order in which the consumers read it.

    ``queries`` are pairs of a descriptor and buffers, for data that is loaded once per tile. ``keys`` and ``values``
    are the descriptors of the raw and the compact source, and buffers.
    """
    d_key, d_compact_key, s_key = keys
    d_value, d_compact_value, s_value = values
    n_columns: gl.constexpr = s_key.shape[3]
    n_queries: gl.constexpr = len(queries)
    i_step = 0
    for i_round in range(count_rounds(work[2])):
        i_b, i_h, p_sequence, i_first, i_low, i_high = tile_of(i_round, work)
        n_full, n_all, cuts = blocks_of(i_low, i_high, rule, n_columns)
        i_kv = i_h // group
        i_row = gl.load(p_sequence + device.QUERY_ROW) + i_first
        i_buffer, i_parity = around(i_round, 2)
        for i_half in gl.static_range(2):
            i_query = i_buffer * 2 + i_half
            b_full = full[0].index(i_query)
            mbarrier.wait(free[0].index(i_query), i_parity ^ 1)
            mbarrier.expect(b_full, n_queries * queries[0][0].block_type.nbytes)
            i_from = [i_b, i_h, i_row + i_half * HALF, 0]
            for i in gl.static_range(n_queries):
                load_block(queries[i][0], i_from, b_full, queries[i][1].index(i_query))
        i_raw_row = gl.load(p_sequence + device.KEY_ROW)
        i_compact_row = gl.load(p_sequence + device.COMPACT_ROW)
        for i_block in range(n_all):
            m_compact, i_column = block_at(i_block, n_full, cuts, n_columns)
            i_row = gl.where(m_compact, i_compact_row, i_raw_row) + i_column
            i_from = [i_b, i_kv, i_row, 0]
            _copy_block(i_step, i_from, m_compact, d_key, d_compact_key, s_key, full[1], free[1])
            _copy_block(i_step, i_from, m_compact, d_value, d_compact_value, s_value, full[2], free[2])
            i_step += 1


@gluon.jit
def own_rows(i_first, i_low, i_high, layout: gl.constexpr):
    """The rows of a consumer's half of a tile, and which of them have a query."""
    o_row = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    return o_row, (i_first + o_row >= i_low) & (i_first + o_row < i_high)


@gluon.jit
def clear(s_rows, count):
    """Zero the rows from ``count`` on, because a P of zero does not remove non-finite values there.

    Both consumers do this before their products, and write the same bits.
    """
    n_rows: gl.constexpr = s_rows.shape[0]
    n_dim: gl.constexpr = s_rows.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // n_dim, n_dim // 8], [4, 1], [1, 0])
    for i_row in gl.static_range(0, n_rows, 32):
        s_part = s_rows.slice(i_row, 32)
        b_rows = s_part.load(layout)
        o_row = i_row + gl.arange(0, 32, gl.SliceLayout(1, layout))
        s_part.store(gl.where((o_row < count)[:, None], b_rows, gl.zeros_like(b_rows)))
    fence_async_shared()
    thread_barrier()
