"""Scores of the tokens of a partition, as plain functions of tensors.

Dimensions: B batch, H key-value heads, P partitions, L lag_size, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONSTANT_CHANNEL = 1e-6
"""A channel is constant if its range is at most this share of its magnitude (README.md, "Selection")."""


@torch.no_grad()
def lag_relative_scores(tokens: Tensor, reference: Tensor) -> Tensor:
    """Softmax over the partition of the channel-wise spread, normalised by the reference's range.

    Args:
        tokens: (…, L, D) keys or values of the partitions.
        reference: (…, L, D) keys or values of the partitions after them.

    Returns:
        (…, L), summing to one over L; float32, or float64 for float64 inputs: bf16 scoring would change 11-15 % of
        the selection.

    Source: LagKV (arXiv 2504.04704), eq. 3-7. Constant channels are 0 and still count, where the published code
    yields NaN for the whole partition.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    tokens, reference = tokens.to(dtype), reference.to(dtype)
    low, high = reference.amin(dim=-2, keepdim=True), reference.amax(dim=-2, keepdim=True)
    span = high - low
    constant = span <= CONSTANT_CHANNEL * torch.maximum(low.abs(), high.abs())
    normalised = (tokens - low) / span.masked_fill(constant, 1.0)
    return normalised.masked_fill(constant, 0.0).std(dim=-1).softmax(dim=-1)


def token_hash(seed: int, *counters: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) from a seed and broadcastable integer counters, the same on every device."""
    state = torch.full((), seed & _MASK, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        state = _mix(state * 31 + counter + 1)
    return _mix(state).double() / (_MASK + 1)


_MASK = (1 << 31) - 1


def _mix(state: Tensor) -> Tensor:
    """A multiply-xorshift finaliser on 31 bits: products stay below 2**62, so int64 never overflows."""
    state = state & _MASK
    state = ((state ^ (state >> 16)) * 0x45D9F3B) & _MASK
    state = ((state ^ (state >> 15)) * 0x2C1B3C6D) & _MASK
    return state ^ (state >> 16)
