"""Selection of the same tokens by all heads of a layer, by the sums of their scores.

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
    """Keep in all heads of a layer the tokens whose scores by another selector, summed over the heads, are the highest.

    A latent of a whole layer serves all its heads, so a cache of latents then holds one of each kept token. Heads with
    budgets of their own share within the heads of equal K.

    Args:
        of: the selector whose scores are summed, also as the dict that its ``to_dict`` made.
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
        """The sums (B, H, P, L), the same in each head."""
        scores = self.of.score(partitions)
        return scores.sum(dim=1, keepdim=True).expand_as(scores)

    def for_layer(self, layer: int) -> SharedHeads:
        """With the selector of that layer."""
        return dataclasses.replace(self, of=self.of.for_layer(layer))

    def for_heads(self, heads: tuple[int, ...]) -> SharedHeads:
        """With the selector of those heads."""
        return dataclasses.replace(self, of=self.of.for_heads(heads))
