"""A model's losses and answers under one attention, and averages over questions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lrsa_lit.evaluation.answer_scores import Match, exact_match, f1_score, recall

_SCORES = {"f1": f1_score, "em": exact_match, "recall": recall}


@dataclass(frozen=True)
class Answers:
    """Losses of the reference answers and, if requested, generated answers; one of each per question.

    Attributes:
        loss: summed cross-entropy of the reference answer's tokens, in nats.
        tokens: number of tokens of the reference answer.
        text: generated answers; None if only losses are requested.
    """

    loss: list[float]
    tokens: list[int]
    text: list[str] | None


def scores(prediction: str, answers: Sequence[str], match: Match) -> dict[str, float]:
    """``f1``, ``em`` (exact match) and ``recall`` of a generated answer, in [0, 1]."""
    return {name: score(prediction, answers, match) for name, score in _SCORES.items()}


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss per token in nats; infinite if it is too large for a float."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def means(sums: Iterable[Mapping[str, float]], *, generated: bool) -> dict[str, float]:
    """Means over questions: ``loss`` per token, the scores if answers were ``generated``, and ``count``.

    The means are NaN if there are no questions.

    Args:
        sums: sums over parts of the questions, for example one part per process: ``loss`` and ``tokens`` as in
            :class:`Answers`, ``count`` of questions, and the scores. The means do not depend on how questions are
            divided.
        generated: whether there are scores.
    """
    total: defaultdict[str, float] = defaultdict(float)
    for name, value in (item for part in sums for item in part.items()):
        total[name] += value
    loss = total["loss"] / total["tokens"] if total["tokens"] else math.nan
    scores = {name: total[name] / total["count"] if total["count"] else math.nan for name in _SCORES if generated}
    return {"loss": loss, **scores, "count": float(total["count"])}
