"""Plots that a study file defines: cells of any rows, attentions and data sets in one plot."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.figure import Figure

from lrsa_lit.analysis.plots import entitle, subplots
from lrsa_lit.experiments.report.cells import Cell, Cells, measure_of
from lrsa_lit.experiments.report.result_plots import lines_of
from lrsa_lit.experiments.report.tables import LABELS

_AXES = {
    "cache": "bytes at the end of the prompt, as a share of a dense cache",
    "pairs": "share of query-key pairs attended to (with sinks, windows, dense layers)",
    "length": "length of the context (tokens, log scale)",
}


def named_plot(cells: Cells, name: str) -> Figure | None:
    """Draw the plot ``name`` of the study's ``plots``, one line for each of its ``lines``; None without results.

    Points without results are left out. If ``x`` is a list of names, each line has one point, or null, per name.
    """
    plot: dict[str, Any] = cells.study.plots[name]
    ticks = plot["x"] if isinstance(plot["x"], list) else []
    measure = measure_of(cells.study, plot["set"])
    found = []
    for label, asked in plot["lines"].items():
        for place, names in enumerate(asked):
            if names and (cell := _cell(cells, plot, names)) is not None:
                x = place if ticks else _x(cell, plot["x"])
                if x is not None:
                    found.append((label, float(x), cell.estimate(measure)))
    if not found:
        return None
    figure, axes = subplots(1, 1, size=(10, 4.5))
    lines_of(axes, found, "", joined=not ticks)
    entitle(axes, plot["title"], "bars: 95 % CI")
    axes.set_ylabel(LABELS[measure])
    axes.set_ylim(bottom=0)
    if ticks:
        axes.set_xticks(range(len(ticks)), [textwrap.fill(tick, 14) for tick in ticks])
    else:
        axes.set_xlabel(_AXES[plot["x"]])
    if plot["x"] == "length":
        lengths = sorted({round(x) for _, x, _ in found})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    return figure


def _cell(cells: Cells, plot: dict[str, Any], names: list[str]) -> Cell | None:
    row, attention, *data_set = names
    return cells.on(*(data_set or [plot["set"]])).cell(row, attention)


def _x(cell: Cell, axis: str) -> float | None:
    if axis == "length":
        return float(cell.line["length"])
    return cell.cache if axis == "cache" else cell.pairs
