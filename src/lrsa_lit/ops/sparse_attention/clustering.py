"""k-means on the directions of keys, with the same result on all devices.

Dimensions: n keys, K clusters, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def cluster_members(keys: Tensor, count: int, iterations: int, *, until_settled: bool = False) -> Tensor:
    """k-means on keys of unit length; every (n / K)-th key is an initial centre.

    Args:
        keys: (…, n, D).
        count: the number of clusters, K >= 0.
        iterations: the most iterations.
        until_settled: stop when the labels no longer change. The check makes the host wait for the device.

    Returns:
        (…, K, n) in at least float32: 1 where a key belongs to a cluster, else 0. Ties go to the earlier cluster.
    """
    unit = normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    ordinal = torch.arange(count, device=keys.device)
    centre = unit[..., ordinal * keys.shape[-2] // max(count, 1), :]
    members = unit.new_zeros((*centre.shape[:-1], keys.shape[-2]))
    for _ in range(iterations if count else 0):
        # The squared distance, without the squared length of the key, which is the same for all centres.
        distance = centre.square().sum(dim=-1, keepdim=True) - 2 * centre @ unit.mT
        nearest = (distance.argmin(dim=-2, keepdim=True) == ordinal[:, None]).to(unit.dtype)
        if until_settled and torch.equal(nearest, members):
            break
        members = nearest
        size = members.sum(dim=-1, keepdim=True)
        centre = torch.where(size > 0, members @ unit / size.clamp(min=1), centre)
    return members
