"""Cross-entropy of the answers' tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lrsa_lit.objectives.objective import Pass, Term

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize


class AnswerLoss(Term):
    """Cross-entropy of the answer's tokens, given the context and the question.

    Args:
        weight: what the mean is multiplied with.
    """

    name = "answers"

    def count(self, size: ExampleSize) -> int:
        """All tokens of the answer."""
        return size.answer

    def loss(self, seen: Pass) -> Tensor:
        """Summed over the answers' tokens."""
        where = seen.positions.answers()
        return seen.head.cross_entropy(seen.hidden[where], seen.tokens[where + 1])
