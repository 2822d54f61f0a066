"""Next-token cross-entropy over whole sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.objectives.objective import Pass, Term

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize


class LanguageModelLoss(Term):
    """Cross-entropy of the next token, at all positions of prompt and answer or at a random share of them.

    Args:
        share: share of each example's positions, drawn at random in each step; 1.0 uses all of them.
        weight: factor of the mean.
    """

    name = "next_tokens"

    def __init__(self, share: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0.0 < share <= 1.0:
            raise UserError("share", share, "a number > 0 and <= 1")
        self.share = share

    def count(self, size: ExampleSize) -> int:
        """The share of the positions, at least one."""
        return min(max(round(self.share * (size.tokens - 1)), 1), size.tokens - 1)

    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over the drawn positions."""
        where = seen.positions.drawn(self.count, self.name)
        return seen.head.cross_entropy(seen.hidden[where], seen.targets[where])
