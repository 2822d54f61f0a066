"""A clustering of keys, and the attention to its clusters.

Dimensions: B batch, H key-value heads, G query heads of each, N new tokens, n clustered keys, K clusters, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A clustering of keys.

    Attributes:
        labels: (B, H, n) int64, each key's cluster.
        centroids: (B, H, K, D), means of the raw keys; zeros for an empty cluster.
    """

    labels: Tensor
    centroids: Tensor

    def member_probabilities(self, query: Tensor, scale: float, alive: Tensor | None = None) -> Tensor:
        """(B, H, n): the estimated attention to each key, mean over queries and group.

        Args:
            query: (B, H, G, N, D).
            scale: factor of the scores.
            alive: (B, H, n) bool, the keys that count; None counts all.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        present = torch.ones_like(self.labels, dtype=dtype) if alive is None else alive.to(dtype)
        counts = torch.zeros_like(self.centroids[..., 0], dtype=dtype).scatter_add(2, self.labels, present)
        logits = query.to(dtype) @ self.centroids.to(dtype)[:, :, None].mT * scale
        # A cluster without keys may have the highest logit, and all others could round to 0.
        logits = logits.masked_fill((counts == 0)[:, :, None, None], -torch.inf)
        most = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        weights = (logits - most).exp()  # (B, H, G, N, K)
        total = (weights * counts[:, :, None, None]).sum(dim=-1, keepdim=True)
        # If no key is left, nothing is read, whatever the threshold.
        of_clusters = torch.where(total > 0, weights / total.clamp(min=torch.finfo(dtype).tiny), -1.0)
        return of_clusters.mean(dim=(2, 3)).gather(2, self.labels)
