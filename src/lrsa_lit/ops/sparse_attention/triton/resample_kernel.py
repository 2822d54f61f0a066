"""A linear map along the tokens of each partition, between two rotations: one pass over keys or values.

The rotations are applied to pairs of channels in registers, so only the tokens and the new rows go through memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrsa_lit.ops.sparse_attention.compressors import Partitions
from lrsa_lit.ops.sparse_attention.rotary import Rotary
from lrsa_lit.ops.sparse_attention.synthesizers import low_pass, places
from lrsa_lit.ops.sparse_attention.triton import host_functions as host
from lrsa_lit.ops.sparse_attention.triton.replay import replayed

Tables = tuple[Tensor, Tensor] | tuple[None, None]
"""Cosines and sines (rows, D/2) float32 of each pair of channels; None without a rotation."""


def compress_frequencies(partitions: Partitions) -> tuple[Tensor, Tensor]:
    """Compress partitions as ``FreqPartition`` does: keys and values (B, H, P, K, D)."""
    key, rotary = partitions.key, partitions.rotary
    assert rotary is not None
    lag, kept, half = key.shape[3], partitions.top_k, key.shape[4] // 2
    weights = low_pass(lag, kept, key.device).float()
    turned = len(rotary.frequencies)
    # The scaling cancels: it is removed before the map and applied again after it.
    padded = Rotary(rotary.frequencies + (0.0,) * (half - turned))
    before, after = (
        padded.tables(at, weights) for at in (torch.arange(lag, device=key.device), places(lag, kept, key.device))
    )
    compact_key: Tensor = Resample.apply(key, weights, before, after, turned)
    compact_value: Tensor = Resample.apply(partitions.value, weights, (None, None), (None, None), 0)
    return compact_key, compact_value


class Resample(torch.autograd.Function):
    """``apply(x, weights, before, after, turned)``: R(after) W R(before)^-1 x, for x (B, H, P, L, D) and W (K, L).

    The first ``turned`` pairs of channels are i and i + ``turned``; the other channels are not rotated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, before: Tables, after: Tables, turned: int) -> Tensor:
        """The new rows (B, H, P, K, D), contiguous."""
        ctx.save_for_backward(weights, *before, *after)
        ctx.turned = turned
        return _launch(x, weights, before, after, turned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The transposed map: rotations are applied where the forward removed them, and the reverse."""
        weights, *tables = ctx.saved_tensors
        return _launch(grad, weights.T.contiguous(), tables[2:], tables[:2], ctx.turned), None, None, None, None


def _launch(x: Tensor, weights: Tensor, before: Any, after: Any, turned: int) -> Tensor:
    x = host.with_rows(x)
    batch, heads, partitions, tokens, dim = x.shape
    rows = len(weights)
    output = x.new_empty((batch, heads, partitions, rows, dim))
    if output.numel() == 0:
        return output
    block = min(max(host.power_of_two(rows), 16), 64)
    _resample_kernel[(partitions * triton.cdiv(rows, block), batch * heads)](
        x, output, weights, *before, *after, *x.stride()[:4], heads, tokens, rows,
        HALF=dim // 2, TURNED=turned, PADDED=max(host.power_of_two(dim // 2), 16), BLOCK_M=block, BLOCK_N=32,
    )  # fmt: skip
    return output


@replayed
@triton.jit(do_not_specialize=["heads", "tokens", "rows"])
def _resample_kernel(
    p_x, p_output, p_weights, p_cos_before, p_sin_before, p_cos_after, p_sin_after,
    stride_xb, stride_xh, stride_xp, stride_xt, heads, tokens, rows,
    HALF: tl.constexpr, TURNED: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One program per BLOCK_M new rows of a partition and head; programs of the same partition run together."""
    n_blocks = tl.cdiv(rows, BLOCK_M)
    i_p, i_bh = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m, o_pair = tl.program_id(0) % n_blocks * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    m_m, m_pair = (o_m < rows)[:, None], (o_pair < HALF)[None, :]
    o_first, o_second = o_pair, HALF + o_pair
    if TURNED > 0 and TURNED < HALF:
        # Pairs without a rotation consist of the two halves of the remaining channels.
        o_first += tl.where(o_pair < TURNED, 0, TURNED)
        o_second = tl.where(o_pair < TURNED, TURNED + o_pair, o_second)
    p_x += i_bh // heads * stride_xb + i_bh % heads * stride_xh + i_p * stride_xp
    # [BLOCK_M, PADDED]
    b_first = tl.zeros([BLOCK_M, PADDED], tl.float32)
    b_second = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for i_n in range(0, tokens, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_x = (o_n < tokens)[:, None] & m_pair
        p_rows = p_x + o_n.to(tl.int64)[:, None] * stride_xt
        # [BLOCK_N, PADDED]
        b_x1 = tl.load(p_rows + o_first[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x2 = tl.load(p_rows + o_second[None, :], mask=m_x, other=0.0).to(tl.float32)
        if p_cos_before is not None:
            o_table = o_n[:, None] * HALF + o_pair[None, :]
            b_cos = tl.load(p_cos_before + o_table, mask=m_x, other=0.0)
            b_sin = tl.load(p_sin_before + o_table, mask=m_x, other=0.0)
            b_x1, b_x2 = b_x1 * b_cos + b_x2 * b_sin, b_x2 * b_cos - b_x1 * b_sin
        # [BLOCK_M, BLOCK_N]
        m_weights = m_m & (o_n < tokens)[None, :]
        b_weights = tl.load(p_weights + o_m[:, None] * tokens + o_n[None, :], mask=m_weights, other=0.0)
        b_first += tl.dot(b_weights, b_x1, input_precision="tf32x3")
        b_second += tl.dot(b_weights, b_x2, input_precision="tf32x3")
    m_output = m_m & m_pair
    if p_cos_after is not None:
        o_table = o_m[:, None] * HALF + o_pair[None, :]
        b_cos = tl.load(p_cos_after + o_table, mask=m_output, other=0.0)
        b_sin = tl.load(p_sin_after + o_table, mask=m_output, other=0.0)
        b_first, b_second = b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin
    p_output += ((i_bh * (tl.num_programs(0) // n_blocks) + i_p) * rows + o_m[:, None]) * (2 * HALF)
    tl.store(p_output + o_first[None, :], b_first.to(p_output.dtype.element_ty), mask=m_output)
    tl.store(p_output + o_second[None, :], b_second.to(p_output.dtype.element_ty), mask=m_output)
