"""Rank the K tokens of each partition with the highest scores, for scores from any kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.replay import replayed


def rank_highest(order: Tensor, keep: int, ranks: Tensor | None = None) -> Tensor:
    """Rank the K highest of an order (B, H, P, L) float32 by position, as ``Selector.keep`` chooses them.

    If ``ranks`` (contiguous) is given, it is filled.

    Returns:
        Ranks (B, H, P, L) int32, 0 … K - 1 in the order of the tokens, -1 for those dropped.
    """
    batch, heads, count, lag = order.shape
    if ranks is None:
        ranks = torch.empty(order.shape, dtype=torch.int32, device=order.device)
    if ranks.numel() > 0:
        _rank_kernel[(count, batch * heads)](
            order.contiguous(), ranks, count, lag, keep, BLOCK=host.power_of_two(lag), num_warps=warps_for(lag)
        )
    return ranks


def warps_for(lag: int) -> int:
    """The number of warps for a program that holds one number per token of a partition."""
    return 1 if lag <= 128 else 4


@replayed
@triton.jit(do_not_specialize=host.INTEGERS)
def _rank_kernel(p_order, p_ranks, n_partitions, lag, keep, BLOCK: tl.constexpr):
    """One program per partition and head."""
    o_partition = (tl.program_id(1).to(tl.int64) * n_partitions + tl.program_id(0)) * lag
    o_token = tl.arange(0, BLOCK)
    m_token = o_token < lag
    b_order = tl.load(p_order + o_partition + o_token, mask=m_token, other=0.0)
    # Integers in the order of torch's sort of the floats: -0 equals 0, NaN is first.
    b_bits = tl.where(b_order == 0.0, 0.0, b_order).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 2147483647, b_bits)
    b_bits = tl.where(b_order == b_order, b_bits, 2147483647)
    b_bits = tl.where(m_token, b_bits, -2147483648)
    store_ranks(p_ranks, b_bits, o_partition, o_token, m_token, keep, True)


@triton.jit
def store_ranks(p_ranks, b_order, o_partition, o_token, m_token, keep, SIGNED: tl.constexpr):
    """Rank the K tokens with the highest integers; ties go to the earlier token.

    Integers are not negative, and padding is -1. If SIGNED, they can be any, and padding is -2 ** 31.
    """
    # Find the K-th highest bit by bit, which is exact for any L without sorting.
    cut = 0
    if SIGNED:
        cut = tl.where(tl.sum((b_order >= 0).to(tl.int32), axis=0) >= keep, 0, -2147483648)
    for i_bit in range(31):
        raised = cut | (1 << (30 - i_bit))
        count = tl.sum((b_order >= raised).to(tl.int32), axis=0)
        cut = tl.where(count >= keep, raised, cut)
    m_above = b_order > cut
    m_tied = b_order == cut
    left = keep - tl.sum(m_above.to(tl.int32), axis=0)
    m_kept = m_above | (m_tied & (tl.cumsum(m_tied.to(tl.int32), axis=0) <= left))
    b_rank = tl.cumsum(m_kept.to(tl.int32), axis=0) - 1
    tl.store(p_ranks + o_partition + o_token, tl.where(m_kept, b_rank, -1), mask=m_token)
