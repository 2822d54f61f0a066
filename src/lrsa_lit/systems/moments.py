"""Mean and covariance of queries that come in call by call.

Dimensions: B batch, H key-value heads, G query heads of each, N tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of the queries of some tokens, in at least float32.

    Attributes:
        count: of the tokens.
        mean: (B, H, G, D).
        products: (B, H, G, D, D), the sum of the outer products of deviations from the mean.
    """

    count: int
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, query: Tensor) -> Moments:
        """Those of queries (B, H, G, N, D), N >= 1."""
        mean = query.mean(dim=3)
        apart = query - mean[:, :, :, None]
        return cls(query.shape[3], mean, apart.mT @ apart)

    def with_those_of(self, other: Moments) -> Moments:
        """Those of the tokens of both (Chan, Golub and LeVeque 1979), so that no query need be kept."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = apart[..., :, None] * apart[..., None, :] * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.products + other.products + between)

    @property
    def covariance(self) -> Tensor:
        """(B, H, G, D, D), divided by the count."""
        return self.products / self.count

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.mean.nbytes + self.products.nbytes

    def rows(self, indices: Tensor) -> Moments:
        """Those of some rows of the batch."""
        return Moments(self.count, self.mean[indices], self.products[indices])
