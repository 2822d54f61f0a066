"""Scores of the tokens of a partition, as plain functions of tensors.

Dimensions: B batch, H key-value heads, P partitions, L lag_size, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CONSTANT_CHANNEL = 1e-6
"""A channel is constant if its range is at most this share of its magnitude (README.md, "Selection")."""

SHRINK = 2.0**-40
"""Normalised values are scaled by this before they are squared, so that float32 holds squares of values up to 1e31.
The factor is exact. Squares underflow only for spreads below 1e-7, which change scores by less than 1e-7 relative."""


class Ranking(NamedTuple):
    """The scores (B, H, P, L) that a selector reports, and the numbers (B, H, P, L) that it sorts by.

    These are the scores themselves, or numbers that still order the tokens where scores underflow.
    """

    scores: Tensor
    order: Tensor


def lag_relative_spread(tokens: Tensor, reference: Tensor) -> Tensor:
    """Unbiased standard deviation over channels, each normalised by the reference's range: (…, L, D) both -> (…, L).

    The results are the logarithms of the scores up to a constant per partition. They are in float32, or float64 for
    float64 inputs: bf16 scoring would change 11-15 % of the selection.

    Source: LagKV (arXiv 2504.04704), eq. 3-6. Constant channels are 0 and still count; the published code yields NaN
    for the whole partition instead.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    tokens, reference = tokens.to(dtype), reference.to(dtype)
    low, high = reference.amin(dim=-2, keepdim=True), reference.amax(dim=-2, keepdim=True)
    span = high - low
    constant = span <= CONSTANT_CHANNEL * torch.maximum(low.abs(), high.abs())
    normalised = (tokens - low) / span.masked_fill(constant, 1.0)
    return normalised.masked_fill_(constant, 0.0).mul_(SHRINK).std(dim=-1) / SHRINK


def weighted_ranking(spreads: Sequence[Tensor], weights: Sequence[float]) -> Ranking:
    """Score by the weighted sum of the softmaxes of one or two spreads (LagKV, eq. 7-8) and order by its logarithm.

    The order is log(exp(first) + exp(second + shift)); the shift follows from the weights and the softmaxes'
    denominators. A positive shift is subtracted from the first spread instead, so that no number is rounded at a
    magnitude above its token's own spread (README.md, "Rounding"). All tensors are (…, L), and weights are > 0.
    """
    parts = [weight * spread.softmax(dim=-1) for weight, spread in zip(weights, spreads, strict=True)]
    if len(spreads) == 1:
        return Ranking(parts[0], spreads[0])
    first, second = spreads
    highest = [spread.amax(dim=-1, keepdim=True) for spread in spreads]
    sums = [(spread - top).exp().sum(dim=-1, keepdim=True) for spread, top in zip(spreads, highest, strict=True)]
    weight = math.log(weights[1]) - math.log(weights[0])
    shift = (highest[0] - highest[1]) + (sums[0] / sums[1]).log() + weight
    first, second = first - shift.clamp(min=0), second + shift.clamp(max=0)
    # Not torch.logaddexp: on the CPU it rounds the last few numbers of a tensor differently, which would break ties.
    order = torch.maximum(first, second) + (-(first - second).abs()).exp().log1p()
    return Ranking(parts[0] + parts[1], order)


def runs_of(of_tokens: Tensor, size: int, padding: float) -> Tensor:
    """Runs of ``size`` consecutive tokens, the last one padded: (…, L) -> (…, runs, size)."""
    padded = pad(of_tokens, (0, -of_tokens.shape[-1] % size), value=padding)
    runs: Tensor = padded.unflatten(-1, (-1, size))
    return runs


def for_tokens(of_runs: Tensor, tokens: Tensor, size: int) -> Tensor:
    """Repeat a number per run for each token of the run: (…, runs) -> (…, L)."""
    return of_runs.repeat_interleave(size, dim=-1)[..., : tokens.shape[-1]]


def run_means(of_tokens: Tensor, size: int) -> Tensor:
    """The mean over each token's run, (…, L) -> (…, L). A shorter last run is averaged over its own length."""
    runs = runs_of(of_tokens, size, 0.0)
    lengths = of_tokens.shape[-1] - size * torch.arange(runs.shape[-2], device=runs.device)
    return for_tokens(runs.sum(dim=-1) / lengths.clamp(max=size), of_tokens, size)


def token_hash(seed: int, *counters: Tensor) -> Tensor:
    """Uniform float64 in [0, 1), hashed from a seed and broadcastable integer counters; equal on every device."""
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
