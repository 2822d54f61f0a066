"""Mean and covariance of queries that arrive over several calls.

Dimensions: B batch, H key-value heads, G query heads of each, N tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the queries of some tokens, in at least float32.

    Attributes:
        count: the number of tokens.
        mean: (B, H, G, D).
        products: (B, H, G, D, D), the sum of the outer products of deviations from the mean.
    """

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, query: Tensor) -> Moments:
        """The moments of queries (B, H, G, N, D), N >= 1."""
        mean = query.mean(dim=3)
        apart = query - mean[:, :, :, None]
        return cls(query.shape[3], mean, apart.mT @ apart)

    def with_those_of(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together (Chan, Golub and LeVeque 1979), without the queries."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = apart[..., :, None] * apart[..., None, :] * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.products + other.products + between)

    @classmethod
    def together(cls, rows: Sequence[Moments]) -> Moments:
        """The moments of further rows of the batch, all of equally many tokens."""
        return cls(rows[0].count, torch.cat([each.mean for each in rows]), torch.cat([each.products for each in rows]))

    @property
    def covariance(self) -> Tensor:
        """(B, H, G, D, D), divided by the count."""
        return self.products / self.count

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.mean.nbytes + self.products.nbytes

    def rows(self, indices: Tensor) -> Moments:
        """The moments of the batch rows ``indices``."""
        return Moments(self.count, self.mean[indices], self.products[indices])
