"""Cross-entropy of the answers' tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrsa_lit.bounds import check_setting
from lrsa_lit.objectives.objective import Pass, Term

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize


class AnswerLoss(Term):
    """Cross-entropy of the answer's tokens, given the context and the question.

    Args:
        weight: factor of the mean.
        per: the unit with equal weight: each ``token`` of a step, or each ``answer``, whose loss is the mean over its
            tokens.

    Raises:
        UserError: the weight is below 0, or ``per`` is neither of these.
    """

    name = "answers"

    def __init__(self, weight: float = 1.0, per: Literal["token", "answer"] = "token") -> None:
        super().__init__(weight)
        check_setting("per", per, per in ("token", "answer"), "token or answer")
        self.per = per

    def count(self, size: ExampleSize) -> int:
        """The number of tokens in the answer, or 1 per answer."""
        return size.answer if self.per == "token" else min(size.answer, 1)

    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over the answers' tokens, or over the answers' means."""
        where = seen.positions.answers()
        hidden, wanted = seen.hidden[where], seen.targets[where]
        if self.per == "token":
            return seen.head.cross_entropy(hidden, wanted)
        counts = np.array([size.answer for size in seen.positions.batch["sizes"]])
        shares = torch.from_numpy((1 / np.maximum(counts, 1))[seen.positions.answered()]).to(hidden.device)

        def weighted(logits: Tensor, tokens: Tensor, share: Tensor) -> Tensor:
            return (cross_entropy(logits, tokens, reduction="none") * share).sum()

        return seen.head.summed(weighted, hidden, wanted, shares.to(torch.promote_types(hidden.dtype, torch.float32)))
