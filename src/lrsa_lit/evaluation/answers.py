"""What a model makes of some questions under one attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrsa_lit.evaluation.answer_scores import Match, exact_match, f1_score, recall


@dataclass(frozen=True)
class Answers:
    """Losses of the reference answers and, where they are asked for, generated answers; one of each for a question.

    Attributes:
        loss: summed cross-entropy of the reference answer's tokens.
        tokens: how many these are.
        text: generated answers; None where only losses are asked for.
    """

    loss: list[float]
    tokens: list[int]
    text: list[str] | None


def scores(prediction: str, answers: Sequence[str], match: Match) -> dict[str, float]:
    """``f1``, ``em`` (exact match) and ``recall`` of a generated answer, in [0, 1]."""
    return {
        "f1": f1_score(prediction, answers, match),
        "em": exact_match(prediction, answers, match),
        "recall": recall(prediction, answers, match),
    }
