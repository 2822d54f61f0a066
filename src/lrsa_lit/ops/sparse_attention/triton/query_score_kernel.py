"""The attention that a partition's tokens receive from the last queries of its reference, in float32.

The matrix of queries times tokens is never written to memory: probabilities are summed over the queries on the fly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.device_functions import LOWEST, load_rows, partition_row
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, partition_table, ranks_shape, sequence_table

_HALF = host.Tile(rows=64, columns=128, warps=4, stages=2)
"""Queries by tokens for 16-bit inputs; a partition of the usual length fits into one block."""


def attention_received(query: Tensor, key: Tensor, geometry: Geometry, window: int, first_rows: Tensor) -> Tensor:
    """Compute ``query_selectors.attention_received`` for the partitions of keys (B, H, T, D): (B, H, P, L).

    The window of each partition consists of w rows of queries (B, Hq, rows, D) from ``first_rows`` (P,) int32 on.
    """
    query, key = host.with_rows(query), host.with_rows(key)
    batch, heads, count, lag = ranks_shape(key, geometry)
    dim = key.shape[3]
    tile = _HALF if key.dtype.itemsize == 2 else host.tiles_for(dim, key.dtype).forward
    tile = tile._replace(columns=min(tile.columns, max(16, host.power_of_two(lag))))
    # If the partition fits into one block, results are stored once; otherwise each block of queries adds to them.
    # Selection needs exact float32 products; products of 16-bit numbers are exact anyway.
    whole = lag <= tile.columns
    received = (torch.empty if whole else torch.zeros)(
        (batch, heads, count, lag), dtype=torch.float32, device=key.device
    )
    if received.numel() > 0:
        _received_kernel[(count, batch * heads)](
            query, key, received, partition_table(geometry, key.device), sequence_table(geometry, key.device),
            first_rows, *host.row_strides(query, key), heads, query.shape[1] // heads, count, geometry.sink, lag,
            window, dim**-0.5 * host.LOG2_E, WHOLE=whole, **(tile.options(dim) | {"PRECISION": "ieee"}),
        )  # fmt: skip
    return received


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _received_kernel(
    p_query, p_key, p_received, p_partitions, p_sequences, p_first_rows,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    heads, group, n_partitions, sink, lag, window, scale_log2,
    WHOLE: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program per partition and key-value head."""
    i_partition, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_key = partition_row(i_partition, p_partitions, p_sequences, sink, lag)
    p_key += i_b * stride_kb + i_h * stride_kh
    p_query += i_b * stride_qb + i_h * group * stride_qh
    p_query += tl.load(p_first_rows + i_partition).to(tl.int64) * stride_qt
    p_received += (i_bh * n_partitions + i_partition) * lag
    n_rows = group * window
    if WHOLE:
        # [BLOCK_N, PADDED]
        b_key = load_rows(p_key, i_key, stride_kt, lag, DIM, BLOCK_N, PADDED, True)
        b_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_row in range(0, n_rows, BLOCK_M):
            b_query, m_row = _query_rows(p_query, i_row, n_rows, window, stride_qh, stride_qt, DIM, BLOCK_M, PADDED)
            b_product = _products(b_query, b_key, lag, PRECISION)
            b_exp = tl.exp2((b_product - tl.max(b_product, axis=1)[:, None]) * scale_log2)
            b_sums += tl.where(m_row[:, None], b_exp / tl.sum(b_exp, axis=1)[:, None], 0.0)
        _add_to(p_received, b_sums, 0, lag, n_rows, False, BLOCK_N)
    else:
        for i_row in range(0, n_rows, BLOCK_M):
            b_query, m_row = _query_rows(p_query, i_row, n_rows, window, stride_qh, stride_qt, DIM, BLOCK_M, PADDED)
            b_highest = tl.full([BLOCK_M], LOWEST, tl.float32)
            b_total = tl.zeros([BLOCK_M], tl.float32)
            for i_n in range(0, lag, BLOCK_N):
                b_key = load_rows(p_key, i_key + i_n, stride_kt, lag - i_n, DIM, BLOCK_N, PADDED, True)
                b_product = _products(b_query, b_key, lag - i_n, PRECISION)
                b_higher = tl.maximum(b_highest, tl.max(b_product, axis=1))
                b_total *= tl.exp2((b_highest - b_higher) * scale_log2)
                b_total += tl.sum(tl.exp2((b_product - b_higher[:, None]) * scale_log2), axis=1)
                b_highest = b_higher
            for i_n in range(0, lag, BLOCK_N):
                b_key = load_rows(p_key, i_key + i_n, stride_kt, lag - i_n, DIM, BLOCK_N, PADDED, True)
                b_exp = tl.exp2((_products(b_query, b_key, lag - i_n, PRECISION) - b_highest[:, None]) * scale_log2)
                b_sums = tl.where(m_row[:, None], b_exp / b_total[:, None], 0.0)
                _add_to(p_received, b_sums, i_n, lag, n_rows, True, BLOCK_N)


@triton.jit
def _query_rows(
    p_query, i_row, n_rows, window, stride_qh, stride_qt, DIM: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Rows of a group's windows, head after head: [BLOCK_M, PADDED], and which of them have a query."""
    o_row = i_row + tl.arange(0, BLOCK_M)
    o_dim = tl.arange(0, PADDED)
    m_row = o_row < n_rows
    o_start = (o_row // window).to(tl.int64) * stride_qh + (o_row % window).to(tl.int64) * stride_qt
    m_tile = m_row[:, None] & (o_dim < DIM)[None, :]
    return tl.load(p_query + o_start[:, None] + o_dim[None, :], mask=m_tile, other=0.0), m_row


@triton.jit
def _products(b_query, b_key, n_keys, PRECISION: tl.constexpr):
    """Products [BLOCK_M, BLOCK_N]; minus infinity from key ``n_keys`` on."""
    b_product = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    return tl.where((tl.arange(0, b_key.shape[0]) < n_keys)[None, :], b_product, float("-inf"))


@triton.jit
def _add_to(p_received, b_sums, i_n, lag, n_rows, ADD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the sums over rows [BLOCK_M, BLOCK_N] / ``n_rows`` for the tokens from ``i_n`` on; if ADD, add them."""
    o_token = i_n + tl.arange(0, BLOCK_N)
    b_mean = tl.sum(b_sums, axis=0) / n_rows
    if ADD:
        # No other program adds to this partition, so the order and the rounding are always the same.
        tl.atomic_add(p_received + o_token, b_mean, mask=o_token < lag, sem="relaxed")
    else:
        tl.store(p_received + o_token, b_mean, mask=o_token < lag)
