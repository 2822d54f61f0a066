"""Preference of one answer over another by the ratio of their odds (ORPO, arXiv 2403.07691; CoLoR, arXiv 2412.18232).

Dimensions: P pairs, M positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lrsa_lit.bounds import check_setting, is_weight
from lrsa_lit.errors import UserError
from lrsa_lit.objectives.objective import Pass, Term

if TYPE_CHECKING:
    from lrsa_lit.data.collate import ExampleSize

_CERTAIN = -1e-6
"""The highest mean log-probability; at 0 the odds would be infinite."""


class OddsRatio(Term):
    """Minus the log-sigmoid of the log odds ratio of the chosen and the rejected answer, mean over pairs.

    With the mean log-probability l of an answer's tokens, its odds are e^l / (1 - e^l). The log odds ratio is
    multiplied by max(1, length_factor (rejected tokens - chosen tokens)), so that pairs which save many tokens count
    more. The losses of ORPO and CoLoR are the sum of this and LanguageModelLoss.

    Args:
        length_factor: 0.1 as in CoLoR; 0 gives ORPO, without a length factor.
        weight: factor of the mean (beta).
    """

    name = "odds_ratio"
    needs_rejected = True

    def __init__(self, length_factor: float = 0.1, weight: float = 2.5) -> None:
        super().__init__(weight)
        check_setting("length_factor", length_factor, is_weight(length_factor), "a finite number >= 0")
        self.length_factor = length_factor

    def count(self, size: ExampleSize) -> int:
        """1 if the example has a rejected answer, else 0."""
        return int(size.rejected > 0)

    def logits(self, size: ExampleSize) -> int:
        """All tokens of both answers."""
        return size.answer + size.rejected if size.rejected else 0

    def loss(self, seen: Pass) -> Tensor:
        """The loss summed over pairs; a UserError if there are none.

        To save memory, the logits of all answers never exist at once. A first pass computes each answer's
        log-probability. A second pass computes the gradient; all tokens of an answer have the same factor.
        """
        where, tokens = seen.positions.pairs()
        if not tokens:
            raise UserError("objective", reason="OddsRatio needs examples with a rejected answer, such as those of "
                            "PreferencePairs")  # fmt: skip
        hidden, wanted = seen.hidden[where], seen.targets[where]
        losses = seen.head.losses(hidden, wanted).double()
        means = -torch.stack([answer.mean() for answer in losses.split(tokens)])
        lengths = torch.tensor(tokens, device=means.device)
        with torch.enable_grad():
            means.requires_grad_()
            (chosen, rejected), (own, other) = means.view(-1, 2).unbind(1), lengths.view(-1, 2).unbind(1)
            value = odds_ratio_losses(chosen, rejected, own, other, self.length_factor).sum()
            (by_mean,) = torch.autograd.grad(value, means)
        by_token = (by_mean / lengths).repeat_interleave(lengths)

        def weighted(logits: Tensor, wanted: Tensor, by_token: Tensor) -> Tensor:
            return -(cross_entropy(logits, wanted, reduction="none") * by_token.to(logits.dtype)).sum()

        carrier = seen.head.summed(weighted, hidden, wanted, by_token)
        return value.detach().to(carrier.dtype) + carrier - carrier.detach()


def odds_ratio_losses(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, length_factor: float = 0.1
) -> Tensor:
    """The loss of each pair, (P,).

    Args:
        chosen: mean log-probability (P,) of the chosen answers' tokens, <= 0.
        rejected: the same for the rejected answers.
        chosen_tokens: (P,), lengths of the chosen answers.
        rejected_tokens: (P,), lengths of the rejected answers.
        length_factor: as in :class:`OddsRatio`.
    """
    chosen, rejected = chosen.clamp(max=_CERTAIN), rejected.clamp(max=_CERTAIN)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    factor = (length_factor * (rejected_tokens - chosen_tokens)).clamp(min=1.0)
    return -logsigmoid(factor * log_odds)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate near 0 and far below (Mächler, 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
