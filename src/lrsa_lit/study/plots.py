"""Plots of a study, in the colours of :mod:`lrsa_lit.analysis.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from lrsa_lit.analysis.plots import OKABE_ITO

if TYPE_CHECKING:
    from lrsa_lit.study.report import Entry

_MARKERS = "osD^vP*X"
_LABELS = {"f1": "F1", "recall": "recall", "em": "exact match"}


def against_share(entries: Sequence[Entry], measure: str, title: str) -> Figure:
    """The score of each row, with its interval, against the share of query-key pairs that are attended to."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rows = dict.fromkeys(entry.cell.row for entry in entries)
    for number, row in enumerate(rows):
        line = sorted((entry for entry in entries if entry.cell.row == row), key=lambda entry: _share(entry))
        shares, scores = [_share(entry) for entry in line], [entry.score.value for entry in line]
        # Rounding may put the ends of an empty interval on the wrong side of its middle.
        errors = [
            [max(0.0, entry.score.value - entry.score.low) for entry in line],
            [max(0.0, entry.score.high - entry.score.value) for entry in line],
        ]
        colour, marker = OKABE_ITO[number % len(OKABE_ITO)], _MARKERS[number % len(_MARKERS)]
        axes.errorbar(shares, scores, errors, fmt=f"{marker}-", color=colour, capsize=3, label=row, alpha=0.85)
    axes.set(
        xlabel="share of the query-key pairs attended to (sinks, windows and dense layers counted)",
        ylabel=f"{_LABELS[measure]} (bars: 95 %)",
        title=title,
    )
    axes.set_ylim(bottom=0)
    axes.legend(title="trained", frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _share(entry: Entry) -> float:
    return float(entry.cell.line["kv_share"])
