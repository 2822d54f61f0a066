"""k-means on the directions of keys, with the same result on all devices.

Dimensions: n keys, K clusters, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHECKED = 8
"""Iterations between two checks whether labels have settled. Settled labels stay the same in further iterations."""
_DISTANCES = 1 << 26
"""The most distances between a key and a centre in memory at a time."""


@torch.no_grad()
def cluster_labels(keys: Tensor, count: int, iterations: int, *, until_settled: bool = False) -> Tensor:
    """k-means on keys of unit length; every (n / K)-th key is an initial centre.

    Args:
        keys: (…, n, D).
        count: the number of clusters, K >= 0.
        iterations: the most iterations, at least 1.
        until_settled: stop soon after the labels no longer change. Each check makes the host wait for the device.

    Returns:
        (…, n) int64, each key's cluster; zeros if there are no clusters. Ties go to the earlier cluster.
    """
    unit = normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    labels = torch.zeros(unit.shape[:-1], dtype=torch.int64, device=unit.device)
    if not count:
        return labels
    centre = unit[..., torch.arange(count, device=keys.device) * keys.shape[-2] // count, :]
    for number in range(iterations):
        # The squared distance, without the squared length of the key, which is the same for all centres.
        length = centre.square().sum(dim=-1, keepdim=True)
        parts = [(length - 2 * centre @ unit[..., some, :].mT).argmin(dim=-2) for some in _blocks(unit, count)]
        nearest = torch.cat(parts, dim=-1)
        if until_settled and number % _CHECKED == _CHECKED - 1 and torch.equal(nearest, labels):
            break
        labels = nearest
        sums, size = cluster_sums(unit, labels, count)
        centre = torch.where(size > 0, sums / size.clamp(min=1), centre)
    return labels


def cluster_sums(rows: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum of the rows (…, n, D) of each cluster, (…, K, D), and its size (…, K, 1), in the dtype of the rows.

    Matrix products, because sums by index differ from run to run on a GPU.
    """
    sums, size = rows.new_zeros(*rows.shape[:-2], count, rows.shape[-1]), rows.new_zeros(*rows.shape[:-2], count, 1)
    for some in _blocks(rows, count):
        own = members(labels[..., some], count, rows.dtype)
        sums, size = sums + own @ rows[..., some, :], size + own.sum(dim=-1, keepdim=True)
    return sums, size


def members(labels: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(…, K, n): 1 where a key with a label (…, n) belongs to a cluster, else 0."""
    return (labels[..., None, :] == torch.arange(count, device=labels.device)[:, None]).to(dtype)


def _blocks(rows: Tensor, count: int) -> Iterator[slice]:
    """Slices of the n rows (…, n, D), of which each has at most ``_DISTANCES`` pairs of a row and a cluster."""
    size = max(1, _DISTANCES // max(rows.shape[:-2].numel() * count, 1))
    for start in range(0, rows.shape[-2], size):
        yield slice(start, start + size)
