"""Compressors that make new pairs of a partition with what more than :class:`MeanPool` needs.

Dimensions: B batch, H key-value heads, P partitions, L lag_size, K top_k, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.ops.sparse_attention.clustering import cluster_members
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


@dataclass(frozen=True)
class Centroids(Compressor):
    """Cluster the keys of a partition; a cluster's pair is the mean of its keys and the mean of its values.

    Ours: it takes over the clustering of Squeezed Attention (arXiv 2411.09688), k-means on keys of length 1, which
    itself keeps all pairs and looks clusters up. Labels are constants for the gradient. An empty cluster has no weight.

    Args:
        iterations: rounds of k-means from every (L/K)-th key on (>= 1); labels that rest stay.
        weigh: add log n to the logits of a cluster of n tokens, so that it weighs as much as they did.
    """

    has_bias: ClassVar[bool] = True

    iterations: int = 10
    weigh: bool = True

    def __post_init__(self) -> None:
        rounds = is_integer(self.iterations) and self.iterations >= 1
        check_setting("iterations", self.iterations, rounds, "an integer >= 1")
        check_setting("weigh", self.weigh, isinstance(self.weigh, bool), "true or false")

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, H, P, K, D) of keys and of values, and the bias (B, H, P, K)."""
        key, value = partitions.key, partitions.value
        members = cluster_members(key, partitions.top_k, self.iterations)
        count = members.sum(dim=-1)
        empty = count == 0
        bias = (count.log() if self.weigh else torch.zeros_like(count)).masked_fill(empty, _NO_WEIGHT)
        # An empty one gets the mean of all keys, which no query can score above each of the other clusters.
        weights = members.masked_fill(empty[..., None], 1.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        compact_key, compact_value = (weights @ tokens.to(weights.dtype) for tokens in (key, value))
        return compact_key.to(key.dtype), compact_value.to(value.dtype), bias


_NO_WEIGHT = -1e4
"""A bias beside which the exponential of every other is infinite, and which half precision can hold."""
