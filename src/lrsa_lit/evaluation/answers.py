"""What a model makes of some questions under one attention, and the averages over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass
class QAScore:
    """Sums over questions: those of several processes add up, so the means do not depend on who had which question.

    Attributes:
        loss: summed cross-entropy of the reference answers' tokens.
        tokens: of the reference answers.
        count: questions.
        scores: sums of ``f1``, ``em`` and ``recall``; empty where nothing was generated.
    """

    loss: float = 0.0
    tokens: int = 0
    count: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def update(self, loss: float, tokens: int, scores: Mapping[str, float]) -> None:
        """Add a question; ``scores`` are empty where nothing was generated."""
        self.loss, self.tokens, self.count = self.loss + loss, self.tokens + tokens, self.count + 1
        self.scores = {name: self.scores.get(name, 0.0) + value for name, value in scores.items()}

    @classmethod
    def total(cls, parts: Iterable[QAScore]) -> QAScore:
        """All questions of all processes."""
        parts = list(parts)
        names = next((part.scores for part in parts if part.count), {})
        scores = {name: sum(part.scores[name] for part in parts if part.count) for name in names}
        loss, tokens, count = (sum(getattr(part, name) for part in parts) for name in ("loss", "tokens", "count"))
        return cls(loss, tokens, count, scores)

    def means(self, *, generated: bool) -> dict[str, float]:
        """``loss`` per token, the scores if answers were ``generated``, and ``count``; NaN without questions."""
        loss = self.loss / self.tokens if self.tokens else math.nan
        scores = {name: self.scores[name] / self.count if self.count else math.nan for name in _SCORES if generated}
        return {"loss": loss, **scores, "count": float(self.count)}
