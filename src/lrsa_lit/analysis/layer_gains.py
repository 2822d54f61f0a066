"""How much the answer loss falls where one of N layers alone is left dense, and which layers to leave dense for it."""

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
    """One question: its place in the split, whether it counts on another device, and its answer's tokens.

    ``losses`` are of the whole answer in nats: with no layer dense, with each single one (N), with all.
    """

    id: str
    position: int
    repeated: bool
    tokens: int
    losses: list[float]


class Gain(NamedTuple):
    """The answer loss, its fall against the loss with no layer dense, and the fall's 95 % interval; in nats a token."""

    loss: float
    fall: float
    low: float
    high: float


class Suggestion(NamedTuple):
    """Layers to leave dense (ascending), K >= 1 of the others, and the share of the pairs that all layers keep.

    A dense layer keeps 1, a sparse one K/L.
    """

    dense_layers: tuple[int, ...]
    top_k: int
    kept: float

    def __str__(self) -> str:
        """As settings of the command line."""
        layers = shlex.quote(str(list(self.dense_layers)))
        return f"{100 * self.kept:.3g} % kept: --model.lrsa.dense_layers {layers} --model.lrsa.top_k {self.top_k}"


class LayerGains:
    """What the answer losses of Q questions say of each layer.

    The rule is that of the sparse layers, and has no dense ones. ``ranking`` has all layers, the most telling one first
    and equal ones in their order.
    """

    def __init__(self, rule: LRSAConfig, model: str, questions: Sequence[Question]) -> None:
        self.rule, self.model, self._questions = rule, model, questions
        self._tokens = np.array([question.tokens for question in questions], dtype=np.float64)
        self._none, *self._single, self._dense = np.array([question.losses for question in questions]).T
        gains = [self._gain(losses) for losses in self._single]
        self.ranking = sorted(enumerate(gains), key=lambda ranked: -ranked[1].fall)

    def suggestion(self, share: float) -> Suggestion:
        """The best layers, as :func:`suggest` has it; none whose dense attention does not lower the loss."""
        best = [layer for layer, gain in self.ranking if gain.fall > 0]
        return suggest(best, len(self._single), self.rule.lag_size, share)

    def table(self) -> Table:
        """The ranking, to be printed."""
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
        table.caption = "Nats a token; each layer is judged alone."
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
        """Of losses (Q,); the questions are drawn in pairs with those of no dense layer."""
        return Gain(self._mean(losses), *ratio_of_sums((self._none - losses)[None], self._tokens[None]))

    def _shown(self, gain: Gain) -> tuple[str, str, str]:
        """Of a single question there is no interval."""
        interval = f"[{gain.low:.4f}, {gain.high:.4f}]" if len(self._questions) > 1 else "-"
        return f"{gain.loss:.4f}", f"{gain.fall:.4f}", interval


def suggest(best: Sequence[int], layers: int, lag_size: int, share: float) -> Suggestion:
    """Leave as many of the best layers dense as a share of kept pairs allows, with the largest K >= 1 in the others.

    The ``best`` of N ``layers`` are those worth being dense, the best one first; 1/L <= share < 1.
    """
    budget = exactly(share) * layers
    count = min(math.floor((budget * lag_size - layers) / (lag_size - 1)), len(best))
    sparse = layers - count
    top_k = math.floor((budget - count) * lag_size / sparse)
    kept = (count + sparse * Fraction(top_k, lag_size)) / layers
    return Suggestion(tuple(sorted(best[:count])), top_k, float(kept))


def exactly(share: float) -> Fraction:
    """The decimal number that was asked for, not the binary one beside it: 0.29 of 100 layers are 29."""
    return Fraction(str(share))
