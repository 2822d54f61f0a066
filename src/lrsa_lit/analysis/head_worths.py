"""How much the answer loss rises when one head keeps nothing, and the K that each head gets from this.

Dimensions: N layers, H key-value heads of each, L lag_size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from lrsa_lit.analysis.layer_gains import Gain, LayerGains, Question, exactly
from lrsa_lit.attention import LRSAConfig
from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically

_SHOWN = 10
"""Number of rows of the table: the first heads of the ranking."""
Worth = TypeVar("Worth", Sequence[float], Sequence[Sequence[float]])


class HeadWorths(LayerGains):
    """The worth of each head, from the answer losses of questions.

    ``losses`` of a question has one entry for each of the N x H heads, layer by layer. The ``fall`` of a :class:`Gain`
    is how much the loss rises if the head keeps nothing, which is the worth of the head.
    """

    def __init__(self, rule: LRSAConfig, model: str, questions: Sequence[Question], heads: int) -> None:
        self.heads = heads
        super().__init__(rule, model, questions)

    @property
    def worths(self) -> list[list[float]]:
        """(N, H), the worth of each head in nats per token."""
        falls = [gain.fall for _, gain in sorted(self.ranking)]
        return [falls[start : start + self.heads] for start in range(0, len(falls), self.heads)]

    def budgets(self, share: float) -> list[list[int]]:
        """K of each head, with a mean of ``share`` times L: see :func:`budgets_for`."""
        budgets: list[list[int]] = budgets_for(self.worths, exactly(share) * self.rule.lag_size, self.rule.lag_size)
        return budgets

    def table(self) -> Table:
        """The first heads of the ranking as a table to print."""
        title = f"One head with K=0, the others L={self.rule.lag_size} K={self.rule.top_k}, on {self._count()}"
        table = Table(title=title)
        table.add_column("K=0")
        for name in ("answer loss", "rise", "95 % interval"):
            table.add_column(name, justify="right")
        for index, gain in self.ranking[:_SHOWN]:
            table.add_row(f"layer {index // self.heads} head {index % self.heads}", *self._shown(gain))
        table.add_section()
        table.add_row("none", f"{self._mean(self._none):.4f}", "", "")
        table.caption = (
            f"Nats per token; {min(_SHOWN, len(self.ranking))} of {len(self.ranking)} heads, each tested alone."
        )
        return table

    def to_dict(self, share: float) -> dict[str, Any]:
        """Plain values for JSON: the rule, the worths (N, H), their ranking, and the budgets for a share."""
        ranking = [
            {"layer": index // self.heads, "head": index % self.heads, **gain._asdict()} for index, gain in self.ranking
        ]
        return {
            "model": self.model,
            "rule": self.rule.to_dict(),
            "worths": self.worths,
            "ranking": ranking,
            "none": {"loss": self._mean(self._none)},
            "questions": [question.id for question in self._questions],
            "share": share,
            "head_top_k": self.budgets(share),
        }

    def _gain(self, losses: Any) -> Gain:
        loss, fall, low, high = super()._gain(losses)
        return Gain(loss, 0.0 - fall, 0.0 - high, 0.0 - low)


def budgets_for(worths: Worth, mean_top_k: float | Fraction, lag_size: int, least: int = 0) -> Any:
    """K of each head, or of each layer, with a given mean: K = L for the best, ``least`` for the others.

    One head between the two groups gets the rest, so that the total is the largest that the mean allows.

    Args:
        worths: worth of each head (N, H) or layer (N,), from an ablation.
        mean_top_k: mean K over all heads or layers.
        lag_size: L.
        least: K of the worst heads or layers.

    Returns:
        Lists of integers, nested like ``worths``; ``LRSAConfig`` accepts them as ``head_top_k``.

    Raises:
        UserError: the mean is not between ``least`` and L.
    """
    found = np.asarray(worths, dtype=np.float64)
    if not 0 <= least <= mean_top_k <= lag_size:
        raise UserError("mean_top_k", float(mean_top_k), f"from {least} to {lag_size}, the lag size")
    spare, budgets = math.floor(mean_top_k * found.size) - least * found.size, np.full(found.size, least)
    for index in np.argsort(-found, axis=None, kind="stable"):
        more = min(lag_size - least, spare)
        budgets[index] += more
        spare -= more
    return budgets.reshape(found.shape).tolist()


def write_budgets(ablation: Path, target: Path, mean_top_k: float, least: int = 0) -> None:
    """Write the budgets for another mean K, from a ``heads.json`` or ``layers.json`` file of an ablation."""
    found = json.loads(ablation.read_text(encoding="utf-8"))
    if "worths" in found:
        worths = found["worths"]
    else:
        worths = [each["fall"] for each in sorted(found["ranking"], key=lambda each: each["layer"])]
    budgets = budgets_for(worths, exactly(mean_top_k), found["rule"]["lag_size"], least)
    write_atomically(target, lambda file: file.write(json.dumps(budgets).encode()))
