"""How much the answer loss falls where one layer is left dense, and which layers to leave dense for it.

Each layer is judged alone, all others being sparse. What several dense layers do together is not looked at.

Dimensions: N layers, Q questions.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.evaluation.statistics import Estimate, ratio_of_sums

Losses = NDArray[np.float64]


class Gain(NamedTuple):
    """The answer loss with one layer dense, and its fall against the loss with none dense; both in nats a token."""

    layer: int
    loss: float
    fall: Estimate


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


@dataclass(frozen=True, eq=False)
class LayerGains:
    """The answer losses of some questions with no layer dense, with each single one, and with all.

    Attributes:
        rule: of the sparse layers; it has no dense ones.
        model: its name.
        ids: of the Q questions.
        tokens: (Q,) answer tokens.
        none: (Q,) summed answer loss in nats with no layer dense.
        single: (N, Q) the same with one layer dense.
        dense: (Q,) the same under the model's own attention in all layers.
    """

    rule: LRSAConfig
    model: str
    ids: Sequence[str]
    tokens: Losses
    none: Losses
    single: Losses
    dense: Losses

    def mean(self, losses: Losses) -> float:
        """Summed losses (Q,) in nats a token."""
        return float(losses.sum() / self.tokens.sum())

    def fall(self, losses: Losses) -> Estimate:
        """How far losses (Q,) lie below those with no layer dense, nats a token; the questions are drawn in pairs."""
        return ratio_of_sums((self.none - losses)[None], self.tokens[None])

    @cached_property
    def ranking(self) -> list[Gain]:
        """All layers, the most telling one first; equal ones in their order."""
        gains = [Gain(layer, self.mean(losses), self.fall(losses)) for layer, losses in enumerate(self.single)]
        return sorted(gains, key=lambda gain: -gain.fall.value)

    def suggestion(self, share: float) -> Suggestion:
        """The best layers, as :func:`suggest` has it; none whose dense attention does not lower the loss."""
        best = [gain.layer for gain in self.ranking if gain.fall.value > 0]
        return suggest(best, len(self.single), self.rule.lag_size, share)

    def table(self) -> Table:
        """The ranking, to be printed."""
        questions = f"{len(self.ids)} question{'' if len(self.ids) == 1 else 's'}"
        rule = f"L={self.rule.lag_size} K={self.rule.top_k}"
        table = Table(title=f"One layer dense, the others {rule}, on {questions}")
        table.add_column("dense")
        for name in ("answer loss", "fall", "95 % interval"):
            table.add_column(name, justify="right")
        for gain in self.ranking:
            table.add_row(f"layer {gain.layer}", f"{gain.loss:.4f}", *self._shown(gain.fall))
        table.add_section()
        table.add_row("none", f"{self.mean(self.none):.4f}", "", "")
        table.add_row("all", f"{self.mean(self.dense):.4f}", *self._shown(self.fall(self.dense)))
        table.caption = "Nats a token; each layer is judged alone."
        return table

    def to_dict(self, share: float) -> dict[str, Any]:
        """Plain values for JSON: the rule, the losses of each question, the ranking and the suggestion."""
        return {
            "model": self.model,
            "rule": self.rule.to_dict(),
            "share": share,
            "suggestion": self.suggestion(share)._asdict(),
            "ranking": [{"layer": gain.layer, "loss": gain.loss, **_fall(gain.fall)} for gain in self.ranking],
            "none": {"loss": self.mean(self.none)},
            "all": {"loss": self.mean(self.dense), **_fall(self.fall(self.dense))},
            "questions": {
                "id": list(self.ids),
                "tokens": self.tokens.astype(int).tolist(),
                "none": self.none.tolist(),
                "all": self.dense.tolist(),
                "layers": self.single.tolist(),
            },
        }

    def _shown(self, fall: Estimate) -> tuple[str, str]:
        """Of a single question there is no interval."""
        return f"{fall.value:.4f}", f"[{fall.low:.4f}, {fall.high:.4f}]" if len(self.ids) > 1 else "-"


def suggest(best: Sequence[int], layers: int, lag_size: int, share: float) -> Suggestion:
    """Leave as many of the best layers dense as a share of kept pairs allows, with the largest K >= 1 in the others.

    Args:
        best: layers worth being dense, the best one first.
        layers: N.
        lag_size: L.
        share: of the pairs that all layers may keep, 1/L <= share < 1.
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


def _fall(fall: Estimate) -> dict[str, float]:
    return {"fall": fall.value, "low": fall.low, "high": fall.high}
