"""How much the answer loss falls when only one of N layers is dense, and which layers to leave dense."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.evaluation.statistics import ratio_of_sums


class Question(NamedTuple):
    """One question with its losses.

    Attributes:
        id: id of the question.
        position: position in the split.
        repeated: whether another device already counts it.
        tokens: number of tokens of the answer.
        losses: losses of the whole answer in nats: with no dense layer, with each single dense layer (N), with all
            layers dense.
    """

    id: str
    position: int
    repeated: bool
    tokens: int
    losses: list[float]


class Gain(NamedTuple):
    """The answer loss, its decrease from the loss without dense layers, and the 95 % interval; in nats per token."""

    loss: float
    fall: float
    low: float
    high: float


class Suggestion(NamedTuple):
    """Layers to leave dense (ascending), K >= 1 of the others, and the share of pairs kept over all layers.

    A dense layer keeps 1, a sparse one K/L.
    """

    dense_layers: tuple[int, ...]
    top_k: int
    kept: float

    def __str__(self) -> str:
        """The suggestion as command-line settings."""
        layers = shlex.quote(str(list(self.dense_layers)))
        return f"{100 * self.kept:.3g} % kept: --model.lrsa.dense_layers {layers} --model.lrsa.top_k {self.top_k}"


class LayerGains:
    """The gain of making each layer dense, from the answer losses of Q questions.

    ``rule`` is the rule of the sparse layers, without dense layers. ``ranking`` lists all layers by gain, largest
    first; ties keep the layers' order.
    """

    def __init__(self, rule: LRSAConfig, model: str, questions: Sequence[Question]) -> None:
        self.rule, self.model, self._questions = rule, model, questions
        self._tokens = np.array([question.tokens for question in questions], dtype=np.float64)
        self._none, *self._single, self._dense = np.array([question.losses for question in questions]).T
        gains = [self._gain(losses) for losses in self._single]
        self.ranking = sorted(enumerate(gains), key=lambda ranked: -ranked[1].fall)

    def suggestion(self, share: float) -> Suggestion:
        """The result of :func:`suggest`, only with layers whose dense attention lowers the loss."""
        best = [layer for layer, gain in self.ranking if gain.fall > 0]
        return suggest(best, len(self._single), self.rule.lag_size, share)

    def table(self) -> Table:
        """The ranking as a table to print."""
        rule = f"L={self.rule.lag_size} K={self.rule.top_k}"
        table = Table(title=f"One layer dense, the others {rule}, on {self._count()}")
        table.add_column("dense")
        for name in ("answer loss", "fall", "95 % interval"):
            table.add_column(name, justify="right")
        for layer, gain in self.ranking:
            table.add_row(f"layer {layer}", *self._shown(gain))
        table.add_section()
        table.add_row("none", f"{self._mean(self._none):.4f}", "", "")
        table.add_row("all", *self._shown(self._gain(self._dense)))
        table.caption = "Nats per token; each layer is tested alone."
        return table

    def to_dict(self, share: float) -> dict[str, Any]:
        """Plain values for JSON: the rule, the losses of each question, the ranking and the suggestion."""
        none, *single, dense = zip(*(question.losses for question in self._questions), strict=True)
        return {
            "model": self.model,
            "rule": self.rule.to_dict(),
            "share": share,
            "suggestion": self.suggestion(share)._asdict(),
            "ranking": [{"layer": layer, **gain._asdict()} for layer, gain in self.ranking],
            "none": {"loss": self._mean(self._none)},
            "all": self._gain(self._dense)._asdict(),
            "questions": {
                "id": [question.id for question in self._questions],
                "tokens": [question.tokens for question in self._questions],
                "none": none,
                "all": dense,
                "layers": single,
            },
        }

    def _count(self) -> str:
        return f"{len(self._questions)} question{'' if len(self._questions) == 1 else 's'}"

    def _mean(self, losses: NDArray[np.float64]) -> float:
        return float(losses.sum() / self._tokens.sum())

    def _gain(self, losses: NDArray[np.float64]) -> Gain:
        """The gain for losses (Q,), paired by question with the losses without dense layers."""
        return Gain(self._mean(losses), *ratio_of_sums((self._none - losses)[None], self._tokens[None]))

    def _shown(self, gain: Gain) -> tuple[str, str, str]:
        """Formatted loss, fall and interval; a single question has no interval."""
        interval = f"[{gain.low:.4f}, {gain.high:.4f}]" if len(self._questions) > 1 else "-"
        return f"{gain.loss:.4f}", f"{gain.fall:.4f}", interval


def suggest(best: Sequence[int], layers: int, lag_size: int, share: float) -> Suggestion:
    """Leave as many of the best layers dense as a share of kept pairs allows, with the largest K >= 1 in the others.

    ``best`` lists the layers (of N ``layers``) that gain from being dense, best first; 1/L <= share < 1.
    """
    budget = exactly(share) * layers
    count = min(math.floor((budget * lag_size - layers) / (lag_size - 1)), len(best))
    sparse = layers - count
    top_k = math.floor((budget - count) * lag_size / sparse)
    kept = (count + sparse * Fraction(top_k, lag_size)) / layers
    return Suggestion(tuple(sorted(best[:count])), top_k, float(kept))


def exactly(share: float) -> Fraction:
    """The exact decimal value, without binary rounding: 0.29 of 100 layers is 29."""
    return Fraction(str(share))
