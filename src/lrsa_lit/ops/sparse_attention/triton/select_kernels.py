"""Lag-relative selection in float32: a kernel for the spread of each token, and a kernel that keeps the K highest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.scoring import CONSTANT_CHANNEL, SHRINK
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.device_functions import partition_row
from lrsa_lit.ops.sparse_attention.triton.rank_kernel import store_ranks, warps_for
from lrsa_lit.ops.sparse_attention.triton.replay import replayed
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, partition_table, ranks_shape, sequence_table

_TOKENS = 32


def select_ranks(
    key: Tensor, value: Tensor, geometry: Geometry, weights: Sequence[float], ranks: Tensor | None = None,
    last: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Score the tokens of all partitions of keys and values (B, H, T, D), and rank the K highest by position.

    The weights of the key and value scores must not both be 0; a score with weight 0 is not computed. If ``ranks``
    (contiguous) is given, it is filled. The ``last`` tokens are always among the K, whatever their scores.

    Returns:
        Ranks (B, H, P, L) int32, 0 … K - 1 in the order of the tokens, -1 for those dropped; and the scores
        (B, H, P, L) float32.
    """
    key, value = host.with_rows(key), host.with_rows(value)
    shape = batch, heads, count, lag = ranks_shape(key, geometry)
    if ranks is None:
        ranks = torch.empty(shape, dtype=torch.int32, device=key.device)
    scores = torch.empty(shape, dtype=torch.float32, device=key.device)
    if ranks.numel() == 0:
        return ranks, scores
    sources = [(tokens, weight) for tokens, weight in zip((key, value), weights, strict=True) if weight]
    spreads = scores.new_empty((len(sources), *shape))
    grid = count, batch * heads
    (first, first_weight), (second, second_weight) = sources[0], sources[-1]
    _spread_kernel[(*grid, len(sources))](
        first, second, spreads, partition_table(geometry, key.device), sequence_table(geometry, key.device),
        *host.row_strides(first, second), heads, count, geometry.sink, lag, DIM=key.shape[3], BLOCK=_TOKENS,
        PADDED=host.power_of_two(key.shape[3]), CONSTANT=CONSTANT_CHANNEL, SHRINK=SHRINK,
    )  # fmt: skip
    _keep_kernel[grid](
        spreads, scores, ranks, count, lag, geometry.keep, last,
        float(first_weight), float(second_weight), math.log(second_weight) - math.log(first_weight),
        BOTH=len(sources) == 2, BLOCK=host.power_of_two(lag), num_warps=warps_for(lag),
    )  # fmt: skip
    return ranks, scores


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _spread_kernel(
    p_first, p_second, p_spreads, p_partitions, p_sequences,
    stride_fb, stride_fh, stride_ft, stride_sb, stride_sh, stride_st, heads, n_partitions, sink, lag,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, CONSTANT: tl.constexpr, SHRINK: tl.constexpr
):  # fmt: skip
    """Unbiased standard deviation over channels of each token, normalised by the range of the next partition.

    One program per partition, head and source. Adjacent programs run together, so a partition is read from memory only
    once; as the reference of the previous one, it comes from the cache.
    """
    i_partition = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_source = tl.program_id(2)
    i_token = partition_row(i_partition, p_partitions, p_sequences, sink, lag)
    stride = stride_ft
    p_tokens = p_first + i_b * stride_fb + i_h * stride_fh
    if i_source == 1:
        stride = stride_st
        p_tokens = p_second + i_b * stride_sb + i_h * stride_sh
    p_tokens += i_token.to(tl.int64) * stride
    p_reference = p_tokens + tl.cast(lag, tl.int64) * stride

    o_dim = tl.arange(0, PADDED)
    o_row = tl.arange(0, BLOCK)
    m_dim = o_dim < DIM
    o_tile = o_row[:, None] * stride + o_dim[None, :]
    b_lows = tl.full([BLOCK, PADDED], float("inf"), tl.float32)
    b_highs = tl.full([BLOCK, PADDED], float("-inf"), tl.float32)
    for i_block in range(0, lag, BLOCK):
        # [BLOCK, PADDED]
        m_tile = (i_block + o_row < lag)[:, None] & m_dim[None, :]
        p_tile = p_reference + tl.cast(i_block, tl.int64) * stride + o_tile
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_lows = tl.minimum(b_lows, tl.where(m_tile, b_tile, float("inf")))
        b_highs = tl.maximum(b_highs, tl.where(m_tile, b_tile, float("-inf")))
    b_low, b_high = tl.min(b_lows, axis=0), tl.max(b_highs, axis=0)

    # For a constant channel the factor is 0, so its values are 0.
    m_varies = b_high - b_low > CONSTANT * tl.maximum(tl.abs(b_low), tl.abs(b_high))
    b_factor = tl.where(m_varies, 1.0 / tl.where(m_varies, b_high - b_low, 1.0), 0.0)
    b_low = tl.where(m_varies, b_low, 0.0)
    p_spread = p_spreads + ((i_source * tl.num_programs(1) + i_bh) * n_partitions + i_partition) * lag
    for i_block in range(0, lag, BLOCK):
        # [BLOCK, PADDED]
        m_row = i_block + o_row < lag
        m_tile = m_row[:, None] & m_varies[None, :]
        p_tile = p_tokens + tl.cast(i_block, tl.int64) * stride + o_tile
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_tile = (b_tile - b_low[None, :]) * b_factor[None, :]
        b_mean = tl.sum(b_tile, axis=1) / DIM
        b_centred = tl.where(m_dim[None, :], b_tile - b_mean[:, None], 0.0) * SHRINK
        b_spread = tl.sqrt(tl.sum(b_centred * b_centred, axis=1) / (DIM - 1)) * (1.0 / SHRINK)
        tl.store(p_spread + i_block + o_row, b_spread, mask=m_row)


@triton.jit
def _exponentials(p_spread, o_token, m_token):
    """Spreads, their maximum, their exponentials relative to it, and the sum of those; padding is 0."""
    # Spreads are not negative, so padding does not change the maximum.
    b_spread = tl.load(p_spread + o_token, mask=m_token, other=0.0)
    highest = tl.max(b_spread, axis=0)
    b_exp = tl.where(m_token, tl.exp(b_spread - highest), 0.0)
    return b_spread, highest, b_exp, tl.sum(b_exp, axis=0)


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _keep_kernel(
    p_spreads, p_scores, p_ranks, n_partitions, lag, keep, last, first_weight, second_weight, log_ratio,
    BOTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per partition and head: one softmax or two, then the K highest; ties go to the earlier token.

    Tokens are ordered by the logarithms of their scores, as in ``scoring.weighted_ranking``, because scores underflow.
    """
    n_heads = tl.num_programs(1)
    o_partition = (tl.program_id(1).to(tl.int64) * n_partitions + tl.program_id(0)) * lag
    o_token = tl.arange(0, BLOCK)
    m_token = o_token < lag
    b_log, highest, b_exp, total = _exponentials(p_spreads + o_partition, o_token, m_token)
    b_score = first_weight * (b_exp / total)
    if BOTH:
        o_second = tl.cast(n_heads, tl.int64) * n_partitions * lag
        p_second = p_spreads + o_second + o_partition
        b_second, second_highest, b_exp, second_total = _exponentials(p_second, o_token, m_token)
        b_score += second_weight * (b_exp / second_total)
        shift = (highest - second_highest) + tl.log(total / second_total) + log_ratio
        b_log -= tl.maximum(shift, 0.0)
        b_second += tl.minimum(shift, 0.0)
        b_log = tl.maximum(b_log, b_second) + tl.log(1.0 + tl.exp(-tl.abs(b_log - b_second)))
    tl.store(p_scores + o_partition + o_token, b_score, mask=m_token)

    if last is not None:
        b_log = tl.where(o_token < lag - last, b_log, float("inf"))
    # The numbers are not negative, so their bits as integers have the same order. NaN is first, as in torch's sort, and
    # padding last.
    b_bits = b_log.to(tl.int32, bitcast=True)
    b_order = tl.where(m_token, tl.where(b_log == b_log, b_bits, 2147483647), -1)
    store_ranks(p_ranks, b_order, o_partition, o_token, m_token, keep, False)
