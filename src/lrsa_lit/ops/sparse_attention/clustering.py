"""k-means of keys by their directions, the same on all devices.

Dimensions: n keys, K clusters, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def cluster_members(keys: Tensor, count: int, iterations: int, *, until_settled: bool = False) -> Tensor:
    """k-means of keys at length 1, from each (n / K)-th of them on.

    Args:
        keys: (…, n, D).
        count: K >= 0.
        iterations: at most.
        until_settled: look after each whether labels rest, for which the host waits for the device.

    Returns:
        (…, K, n) in at least float32, one for the members of each cluster and else zero; ties go to the earlier one.
    """
    unit = normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    ordinal = torch.arange(count, device=keys.device)
    centre = unit[..., ordinal * keys.shape[-2] // max(count, 1), :]
    members = unit.new_zeros((*centre.shape[:-1], keys.shape[-2]))
    for _ in range(iterations if count else 0):
        # The squared distance, but for the length of the key.
        distance = centre.square().sum(dim=-1, keepdim=True) - 2 * centre @ unit.mT
        nearest = (distance.argmin(dim=-2, keepdim=True) == ordinal[:, None]).to(unit.dtype)
        if until_settled and torch.equal(nearest, members):
            break
        members = nearest
        size = members.sum(dim=-1, keepdim=True)
        centre = torch.where(size > 0, members @ unit / size.clamp(min=1), centre)
    return members
