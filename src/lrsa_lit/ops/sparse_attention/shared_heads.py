"""Selection of the same tokens in all heads of a layer, by the sum of the heads' scores.

Dimensions: B batch, H key-value heads, P partitions, L lag_size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lrsa_lit.bounds import check_setting
from lrsa_lit.ops.sparse_attention.compressors import Compressor, LagRelative, Partitions, Selector


@dataclass(frozen=True)
class SharedHeads(Selector):
    """Keep the same tokens in all heads of a layer: those with the highest sum of another selector's scores.

    With a cache of latents, one latent per kept token then serves all heads of the layer. If heads have different
    budgets, the heads with equal K share their tokens.

    Args:
        of: the selector whose scores are summed, or its dict from ``to_dict``.
    """

    of: Selector = field(default_factory=LagRelative)
    shared_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        made = self.of if isinstance(self.of, Compressor) else Compressor.from_dict(self.of, "of")
        plain = isinstance(made, Selector) and made.plain is made and not made.takes_scores
        check_setting("of", type(made).__name__, plain, "a Selector other than StraightThrough and TokenGate")
        object.__setattr__(self, "of", made)
        object.__setattr__(self, "window", made.window)
        object.__setattr__(self, "needs_rotary", made.needs_rotary)

    def score(self, partitions: Partitions) -> Tensor:
        """The sums (B, H, P, L), equal for all heads."""
        scores = self.of.score(partitions)
        return scores.sum(dim=1, keepdim=True).expand_as(scores)

    def for_layer(self, layer: int) -> SharedHeads:
        """The same, with the selector of that layer."""
        return dataclasses.replace(self, of=self.of.for_layer(layer))

    def for_heads(self, heads: tuple[int, ...]) -> SharedHeads:
        """The same, with the selector of those heads."""
        return dataclasses.replace(self, of=self.of.for_heads(heads))
