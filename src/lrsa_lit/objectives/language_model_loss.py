"""Cross-entropy of the next tokens of whole contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lrsa_lit.errors import UserError
from lrsa_lit.objectives.objective import Pass, Term

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize


class LanguageModelLoss(Term):
    """Cross-entropy of the next token, at all positions of prompt and answer or at some of them.

    Args:
        share: of the positions of each example, drawn anew in each step; 1.0 takes all of them.
        weight: what the mean is multiplied with.
    """

    name = "next_tokens"

    def __init__(self, share: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0.0 < share <= 1.0:
            raise UserError("share", share, "a number > 0 and <= 1")
        self.share = share

    def count(self, size: ExampleSize) -> int:
        """The share, at least one position."""
        return min(max(round(self.share * (size.tokens - 1)), 1), size.tokens - 1)

    def loss(self, seen: Pass) -> Tensor:
        """Summed over the positions that were drawn."""
        where = seen.positions.drawn(self.count, self.name)
        return seen.head.cross_entropy(seen.hidden[where], seen.targets[where])
