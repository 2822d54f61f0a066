"""Attention of one new query per row over a buffer whose filled lengths are on the device.

The keys are split into slices among programs, and a second kernel joins their partial results. Grids and memory depend
only on the buffer's capacity, and each row's slices follow from its length on the device. So the host never waits for
the lengths, and a CUDA graph of the call stays valid while they grow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton import device_functions as device
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.forward_kernel import attend_block
from lrsa_lit.ops.sparse_attention.triton.replay import replayed

_PROGRAMS = 2 * 132
"""The desired number of programs: enough loads in flight to saturate the memory of a GPU with 132 multiprocessors."""
_MOST_SPLITS = 128
_CHANNELS = 32
"""The number of channels that one program of the second kernel joins."""


@torch.library.custom_op("lrsa_lit::attend_one", mutates_args=())
def attend_one(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention of one query per row over the filled rows of a buffer; arguments of ``eager.attend_one``."""
    query, scale = host.positive_scale(query, scale)
    scale_log2 = scale * host.LOG2_E
    query, key, value = host.with_rows(query), host.with_rows(key), host.with_rows(value)
    batch, query_heads, _, dim = query.shape
    heads, capacity = key.shape[1:3]
    length = length.expand(batch)
    group, rows = query_heads // heads, batch * query_heads
    tile, splits = _cut_for(dim, query.dtype, group, batch * heads, capacity)
    partial_output = query.new_empty((splits, rows, dim), dtype=torch.float32)
    # Maximum and sum instead of the log-sum-exp; see _join_kernel.
    partial_max, partial_sum = query.new_empty((2, splits, rows), dtype=torch.float32)
    _slice_kernel[(splits, batch * heads, triton.cdiv(group, tile.rows))](
        query, key, value, length, partial_output, partial_max, partial_sum,
        *query.stride()[:2], *host.row_strides(key, value), length.stride(0), heads, group, scale_log2,
        **tile.options(dim),
    )  # fmt: skip
    output = query.new_empty(query.shape)
    block = min(host.power_of_two(dim), _CHANNELS)
    _join_kernel[(rows, triton.cdiv(dim, block))](
        partial_output, partial_max, partial_sum, output, scale_log2, DIM=dim, BLOCK=block, SPLITS=splits
    )
    return output


@attend_one.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


def _cut_for(dim: int, dtype: torch.dtype, group: int, batch_heads: int, capacity: int) -> tuple[host.Tile, int]:
    """A tile that fits twice into a multiprocessor's registers and shared memory, and as many splits as fill the GPU.

    A tile's rows are query heads of one group, at least 16, as matrix products need; its columns are keys.
    """
    rows = max(16, host.power_of_two(group))
    if dtype == torch.float32:
        rows, columns, stages = (min(rows, 16), 16, 2) if dim > 128 else (min(rows, 32), 32, 2)
    elif dim > 128:
        rows, columns, stages = min(rows, 32), 32, 3
    else:
        rows, columns, stages = min(rows, 64), 128 if dim <= 64 and rows == 16 else 64, 3
    wanted = max(_PROGRAMS // max(batch_heads * triton.cdiv(group, rows), 1), 1)
    # The largest power of two up to the desired number, and at most one split per block.
    splits = min(1 << (wanted.bit_length() - 1), host.power_of_two(triton.cdiv(capacity, columns)), _MOST_SPLITS)
    return host.Tile(rows, columns, 4, stages), splits


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _slice_kernel(
    p_query, p_key, p_value, p_length, p_partial_output, p_partial_max, p_partial_sum,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_lb,
    heads, group, scale_log2,
    DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program per slice of keys, key-value head, and BLOCK_M of its query heads; keys and values are read once.

    Stores, for each query head, the highest score, the sum of exponentials relative to it, and the weighted values.
    """
    i_split, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_kv = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    n_keys = tl.load(p_length + i_b * stride_lb)
    # Slices consist of whole blocks, so only the last slice with keys has a block that is not full.
    n_slice = tl.cdiv(tl.cdiv(n_keys, tl.num_programs(0)), BLOCK_N) * BLOCK_N
    i_from = i_split * n_slice
    i_to = tl.minimum(i_from + n_slice, n_keys)

    o_g = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_g = o_g < group
    o_dim = tl.arange(0, PADDED)
    o_n = tl.arange(0, BLOCK_N)
    o_h = i_kv * group + o_g
    # [BLOCK_M, PADDED]
    b_query = device.load_tile(p_query + i_b * stride_qb, o_h, stride_qh, m_g, DIM, PADDED)
    b_output = tl.zeros([BLOCK_M, PADDED], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], device.LOWEST, tl.float32)
    p_key += i_b * stride_kb + i_kv * stride_kh
    p_value += i_b * stride_vb + i_kv * stride_vh
    for i_n in range(i_from, i_to, BLOCK_N):
        # [BLOCK_N, PADDED]
        b_key = device.load_rows(p_key, i_n, stride_kt, i_to - i_n, DIM, BLOCK_N, PADDED, True)
        b_value = device.load_rows(p_value, i_n, stride_vt, i_to - i_n, DIM, BLOCK_N, PADDED, True)
        m_filled = (i_n + o_n < i_to)[None, :]
        b_output, b_sum, b_max = attend_block(
            (b_output, b_sum, b_max), (b_query,), b_key, b_value, m_filled, scale_log2, PRECISION
        )

    o_row = (i_split.to(tl.int64) * (tl.num_programs(1) // heads) + i_b) * heads * group + o_h
    tl.store(p_partial_max + o_row, b_max, mask=m_g)
    tl.store(p_partial_sum + o_row, b_sum, mask=m_g)
    # An empty slice has the sum zero, and its output is never read.
    p_partial_output += o_row[:, None] * DIM + o_dim[None, :]
    # Compare as a block, because Triton 3.9's interpreter returns an integer for compared scalars.
    m_some = tl.zeros([1, 1], tl.int32) + i_from < i_to
    tl.store(p_partial_output, b_output, mask=m_g[:, None] & (o_dim < DIM)[None, :] & m_some)


@replayed
@triton.jit
def _join_kernel(
    p_partial_output, p_partial_max, p_partial_sum, p_output, scale_log2,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """One program per query head and BLOCK of its channels.

    Slices are weighted by the difference of their maxima, which is computed before scaling, as within a slice.
    Logarithms of their sums would include the rounding of the highest score.
    """
    i_row, n_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_slice = tl.arange(0, SPLITS) * tl.cast(n_rows, tl.int64) + i_row
    o_dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # [SPLITS]
    b_max = tl.load(p_partial_max + o_slice)
    b_sum = tl.load(p_partial_sum + o_slice)
    b_weight = tl.exp2((b_max - tl.max(b_max, axis=0)) * scale_log2)
    # [SPLITS, BLOCK]
    m_partial = (b_sum > 0)[:, None] & (o_dim < DIM)[None, :]
    b_partial = tl.load(p_partial_output + o_slice[:, None] * DIM + o_dim[None, :], mask=m_partial, other=0.0)
    b_total = tl.sum(b_weight * b_sum, axis=0)
    b_output = tl.div_rn(tl.sum(b_weight[:, None] * b_partial, axis=0), tl.zeros([BLOCK], tl.float32) + b_total)
    tl.store(p_output + i_row * DIM + o_dim, b_output.to(p_output.dtype.element_ty), mask=o_dim < DIM)
