"""Gather the compact buffer of a selection: sinks, then the kept tokens of each partition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton import device_functions as device
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import (
    Geometry,
    compact_shape,
    partition_starts,
    partition_table,
    sequence_table,
)

_BLOCK = 32


def gather_compact(key: Tensor, value: Tensor, ranks: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Copy the kept pairs out of keys and values (B, H, T, D).

    A rank (B, H, P, L) int32 is a token's index among the K kept tokens of its partition, or -1 if it is dropped.

    Returns:
        Keys and values (B, H, M, D), contiguous; the rows of sequences follow one another.
    """
    key, value = host.with_rows(key), host.with_rows(value)
    shape = batch, heads, rows, dim = compact_shape(key, geometry)
    compact_key, compact_value = key.new_empty(shape), value.new_empty(shape)
    if compact_key.numel() == 0:
        return compact_key, compact_value
    table = partition_table(geometry, key.device)
    _gather_kernel[(table.shape[0], batch * heads)](
        key, value, ranks, compact_key, compact_value, table, sequence_table(geometry, key.device),
        *host.row_strides(key, value), heads, ranks.shape[2], rows, geometry.sink, geometry.lag, geometry.keep,
        DIM=dim, BLOCK=_BLOCK, PADDED=host.power_of_two(dim),
    )  # fmt: skip
    return compact_key, compact_value


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _gather_kernel(
    p_key, p_value, p_ranks, p_compact_key, p_compact_value, p_table, p_sequences,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, heads, n_partitions, n_rows, sink, lag, keep,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """One program per partition (or sequence's sinks) and head."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_entry = p_table + tl.program_id(0) * 2
    i_sequence, i_partition = tl.load(p_entry), tl.load(p_entry + 1)
    p_sequence = p_sequences + i_sequence * device.COLUMNS
    i_key, i_compact = tl.load(p_sequence + device.KEY_ROW), tl.load(p_sequence + device.COMPACT_ROW)
    is_sink = i_partition < 0
    p_rank = p_ranks + (i_bh * n_partitions + tl.load(p_sequence + device.PARTITION_ROW) + i_partition) * lag

    # Sinks come first; the kept tokens of partition p follow those of p - 1.
    n_tokens = tl.where(is_sink, tl.where(tl.load(p_sequence + device.PARTITIONS) > 0, sink, 0), lag)
    n_ranked = tl.where(is_sink, 0, lag)
    i_token = i_key + tl.where(is_sink, 0, sink + i_partition * lag)
    i_slot = i_compact + tl.where(is_sink, 0, sink + i_partition * keep)

    p_key += i_b * stride_kb + i_h * stride_kh + i_token.to(tl.int64) * stride_kt
    p_value += i_b * stride_vb + i_h * stride_vh + i_token.to(tl.int64) * stride_vt
    o_slots = (i_bh * n_rows + i_slot) * DIM
    o_dim = tl.arange(0, PADDED)
    for i_block in range(0, n_tokens, BLOCK):
        o_token = i_block + tl.arange(0, BLOCK)
        m_token = o_token < n_tokens
        b_kept = tl.load(p_rank + o_token, mask=o_token < n_ranked, other=-1)
        b_rank = tl.where(is_sink, o_token, b_kept)
        # [BLOCK, PADDED]: only kept rows are read
        m_rows = (m_token & (b_rank >= 0))[:, None] & (o_dim < DIM)[None, :]
        o_out = o_slots + b_rank[:, None] * DIM + o_dim[None, :]
        b_key = tl.load(p_key + o_token.to(tl.int64)[:, None] * stride_kt + o_dim[None, :], mask=m_rows)
        tl.store(p_compact_key + o_out, b_key, mask=m_rows)
        b_value = tl.load(p_value + o_token.to(tl.int64)[:, None] * stride_vt + o_dim[None, :], mask=m_rows)
        tl.store(p_compact_value + o_out, b_value, mask=m_rows)


def ranks_of(indices: Tensor, geometry: Geometry) -> Tensor:
    """The ranks (B, H, P, L) int32 of a selection's positions (B, H, P, K), which ascend within a partition."""
    places = torch.arange(indices.shape[3], dtype=torch.int32, device=indices.device).expand(indices.shape)
    ranks = places.new_full((*indices.shape[:3], geometry.lag), -1)
    return ranks.scatter_(3, indices - partition_starts(geometry, indices.device)[:, None], places)
