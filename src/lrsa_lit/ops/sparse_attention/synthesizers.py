"""Compressors that make new pairs and need more than :class:`MeanPool`: a rotation, or a bias.

Dimensions: B batch, H key-value heads, P partitions, L lag_size, K top_k, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.ops.sparse_attention.clustering import cluster_labels, members
from lrsa_lit.ops.sparse_attention.compressors import Compressor, Partitions


@dataclass(frozen=True)
class FreqPartition(Compressor):
    """Keep the K lowest frequencies of each channel along the partition, on keys without their rotation.

    This is FreqKV (arXiv 2505.00570) per partition. The transform is the same, but each partition is compressed once
    and separately, whereas FreqKV compresses its whole cache repeatedly. Positions stay those of the sequence, whereas
    FreqKV rotates by cache slots: compact key j is rotated to (2j + 1) L / 2K - 1/2 in its partition, the middle of the
    tokens that it represents. The transform is linear, so each pair's gradient reaches all L tokens.
    """

    needs_rotary: ClassVar[bool] = True
    ignores_place: ClassVar[bool] = True

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor]:
        """R(places) W R(tokens)^-1 keys, and W values, with the W of :func:`low_pass`."""
        key, value, rotary = partitions.key, partitions.value, partitions.rotary
        assert rotary is not None
        lag, kept = key.shape[-2], partitions.top_k
        weights = low_pass(lag, kept, key.device).to(torch.promote_types(key.dtype, torch.float32))
        # W mixes tokens and the rotation mixes channels, so the partition's start makes no difference.
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
    """(K,) float64: the middles of K equal parts of a partition of L tokens."""
    return (2 * torch.arange(kept, dtype=torch.float64, device=device) + 1) * lag / (2 * max(kept, 1)) - 0.5


@dataclass(frozen=True)
class Centroids(Compressor):
    """Cluster the keys of a partition; a cluster's pair is the mean of its keys and the mean of its values.

    Our own variant with the clustering of Squeezed Attention (arXiv 2411.09688): k-means on keys of unit length.
    Squeezed Attention itself keeps all pairs and uses the clusters for lookup. Labels are constants for the gradient.
    An empty cluster gets no attention.

    Args:
        iterations: iterations of k-means (>= 1), which starts from every (L/K)-th key.
        weigh: add log n to the logits of a cluster of n tokens, so that it weighs as much as its tokens did.
    """

    has_bias: ClassVar[bool] = True
    ignores_place: ClassVar[bool] = True

    iterations: int = 10
    weigh: bool = True

    def __post_init__(self) -> None:
        rounds = is_integer(self.iterations) and self.iterations >= 1
        check_setting("iterations", self.iterations, rounds, "an integer >= 1")
        check_setting("weigh", self.weigh, isinstance(self.weigh, bool), "true or false")

    def compress(self, partitions: Partitions) -> tuple[Tensor, Tensor, Tensor]:
        """Means (B, H, P, K, D) of keys and of values, and the bias (B, H, P, K)."""
        key, value = partitions.key, partitions.value
        labels = cluster_labels(key, partitions.top_k, self.iterations)
        own = members(labels, partitions.top_k, torch.promote_types(key.dtype, torch.float32))
        count = own.sum(dim=-1)
        empty = count == 0
        bias = (count.log() if self.weigh else torch.zeros_like(count)).masked_fill(empty, _NO_WEIGHT)
        # An empty cluster gets the mean of all keys: no query scores that higher than every other cluster.
        weights = own.masked_fill(empty[..., None], 1.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        compact_key, compact_value = (weights @ tokens.to(weights.dtype) for tokens in (key, value))
        return compact_key.to(key.dtype), compact_value.to(value.dtype), bias


_NO_WEIGHT = -1e4
"""The bias of an empty cluster: so low that its attention weight is 0, yet within the range of float16."""
