"""Compressors that make new pairs of a partition with what more than :class:`MeanPool` needs.

Dimensions: B batch, H key-value heads, P partitions, L lag_size, K top_k, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.compressors import Compressor, Partitions


@dataclass(frozen=True)
class FreqPartition(Compressor):
    """Keep the K lowest frequencies of each channel along the partition, on keys without their rotation.

    Our partition form of FreqKV (arXiv 2505.00570): its transform, but each partition is compressed once and by itself,
    and positions stay those of the sequence: compact key j is rotated at the place (2j + 1) L / 2K - 1/2 of its
    partition, the middle of the stretch that it stands for. FreqKV compresses its whole cache again and again, and
    rotates by slots. Linear, so that each pair has gradient to all L.
    """

    needs_rotary: ClassVar[bool] = True

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """R(places) W R(tokens)^-1 keys, and W values, with the W of :func:`low_pass`."""
        key, value, rotary = partitions.key, partitions.value, partitions.rotary
        assert rotary is not None
        lag, kept = key.shape[-2], partitions.top_k
        weights = low_pass(lag, kept, key.device).to(torch.promote_types(key.dtype, torch.float32))
        # W mixes tokens and the rotation mixes channels: where the partition starts makes no difference.
        raw = rotary.unrotate(key, torch.arange(lag, device=key.device))
        compact_key = rotary.rotate(weights @ raw, places(lag, kept, key.device))
        return compact_key.to(key.dtype), (weights @ value.to(weights.dtype)).to(value.dtype)


def low_pass(lag: int, kept: int, device: torch.device) -> Tensor:
    """W (K, L) float64: DCT-II along L tokens, its first K coefficients, inverse DCT at length K, times sqrt(K / L).

    Row j, column l: (1 + 2 sum over 0 < m < K of cos(pi m (2j+1) / 2K) cos(pi m (2l+1) / 2L)) / L; rows add up to 1.
    """
    m = torch.arange(1, max(kept, 1), dtype=torch.float64, device=device)
    short, long = (
        torch.cos(math.pi / (2 * max(size, 1)) * torch.outer(2 * torch.arange(size, device=device) + 1, m))
        for size in (kept, lag)
    )
    return (1 + 2 * short @ long.T) / lag


def places(lag: int, kept: int, device: torch.device) -> Tensor:
    """(K,) float64: where in a partition of L tokens the middles of K equal stretches are."""
    return (2 * torch.arange(kept, dtype=torch.float64, device=device) + 1) * lag / (2 * max(kept, 1)) - 0.5
