"""What a model makes of some questions under one attention, and the averages over them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lrsa_lit.evaluation.answer_scores import Match, exact_match, f1_score, recall

_SCORES = {"f1": f1_score, "em": exact_match, "recall": recall}


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
    return {name: score(prediction, answers, match) for name, score in _SCORES.items()}


def perplexity(loss: float) -> float:
    """That of a mean loss of a token, in nats; infinite where it is too large for a float."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def means(sums: Iterable[Mapping[str, float]], *, generated: bool) -> dict[str, float]:
    """``loss`` per token, the scores if answers were ``generated``, and ``count``; NaN without questions.

    Args:
        sums: of parts of the questions, such as those of each process: ``loss`` and ``tokens`` as in :class:`Answers`,
            ``count`` of questions, and the scores. They add up, so the means do not depend on who had which question.
        generated: whether there are scores.
    """
    total: defaultdict[str, float] = defaultdict(float)
    for name, value in (item for part in sums for item in part.items()):
        total[name] += value
    loss = total["loss"] / total["tokens"] if total["tokens"] else math.nan
    scores = {name: total[name] / total["count"] if total["count"] else math.nan for name in _SCORES if generated}
    return {"loss": loss, **scores, "count": float(total["count"])}
