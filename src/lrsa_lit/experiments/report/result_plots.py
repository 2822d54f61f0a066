"""Plots of a study, in the colours of :mod:`lrsa_lit.analysis.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from lrsa_lit.analysis.plots import OKABE_ITO, entitle, legend, subplots
from lrsa_lit.experiments.report.tables import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lrsa_lit.evaluation.statistics import Estimate
    from lrsa_lit.experiments.report.cells import Cell, Entry
    from lrsa_lit.experiments.report.evidence import LayerGain
    from lrsa_lit.experiments.results import Line

_MARKERS = "osD^vP*X"

_MOST_WITH_INTERVALS = 12
"""With more lines in a plot, their intervals hide each other."""


def against_share(entries: Sequence[Entry], measure: str, title: str) -> Figure:
    """Plot the score of each row, with its interval, against the share of query-key pairs attended to.

    ``title`` names the part and the data set.
    """
    figure, axes = subplots(1, 1, size=(7, 4))
    lines_of(axes, [(entry.cell.row, entry.cell.pairs, entry.score) for entry in entries])
    entitle(axes, f"{LABELS[measure]} against the share of pairs attended to", f"{title}; bars: 95 % CI")
    axes.set(xlabel="share of query-key pairs (with sinks, windows, dense layers)", ylabel=LABELS[measure])
    axes.set_ylim(bottom=0)
    return figure


def against_cache(found: Sequence[tuple[str, float, Estimate]], label: str, title: str) -> Figure:
    """Plot a score against cache bytes, as a share of a dense cache; one line per system, the best one first.

    Few systems have intervals.
    """
    best: dict[str, float] = {}
    for name, _, score in found:
        best[name] = max(score.value, best.get(name, score.value))
    found, few = sorted(found, key=lambda each: -best[each[0]]), len(best) <= _MOST_WITH_INTERVALS
    figure, axes = subplots(1, 1, size=(9, max(5, 1 + 0.25 * len(best))))
    lines_of(axes, found, "system", intervals=few)
    about = "bars: 95 % CI" if few else "best first; the table has the 95 % CIs"
    entitle(axes, f"{label} against the size of the cache", f"{title}; {about}")
    axes.set(xlabel="bytes at the end of the prompt, as a share of a dense cache (log scale)", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_ylim(bottom=0)
    return figure


def perplexity(texts: Sequence[Cell]) -> Figure | None:
    """Plot the perplexity of each row against the share of pairs kept, one panel per text; None without results."""
    names = list(dict.fromkeys(cell.line["set"] for cell in texts))
    if not names:
        return None
    figure, panels = subplots(len(names), 1, size=(7, 3.6 * len(names)), squeeze=False)
    for axes, name in zip(panels[:, 0], names, strict=True):
        shown = [cell for cell in texts if cell.line["set"] == name]
        lines_of(axes, [(cell.row, cell.kept, cell.estimate("loss").exp()) for cell in shown])
        entitle(axes, "Perplexity against the share of pairs kept", f"{name}; bars: 95 % CI")
        axes.set(xlabel="share of pairs kept (K/L; 1 in dense layers)", ylabel="perplexity")
    return figure


def survival(found: Sequence[tuple[Cell, Cell]]) -> Figure | None:
    """Plot the share of the supporting passages' tokens that a head keeps, divided by K/L; None without results.

    Each attention has a line, with the base LLM and all rows trained from it.
    """
    groups: dict[str, list[tuple[Cell, Cell]]] = {}
    for pair in found:
        # If nothing is kept, chance is 0 and the ratio is undefined.
        if pair[1].survival("chance"):
            groups.setdefault(f"{pair[1].line['set']}: {pair[1].attention}", []).append(pair)
    if not groups:
        return None
    figure, axes = subplots(1, 1, size=(8, 1.8 + 0.25 * len(groups)))
    axes.axvline(1.0, color="grey", linestyle="--", label="chance, K/L")
    for side, (when, marker) in enumerate((("before", "o"), ("after", "D"))):
        kept = [(pair[side].survival("gold") / pair[1].survival("chance"), place)
                for place, pairs in enumerate(groups.values()) for pair in pairs]  # fmt: skip
        axes.plot(*zip(*kept, strict=True), marker, alpha=0.5, label=f"{when} training")
    axes.set_yticks(range(len(groups)), list(groups))
    entitle(axes, "Supporting tokens kept, before and after training", "right of the line: more than random selection")
    axes.set(xlabel="kept share of the supporting passages' tokens, divided by K/L", ylim=(len(groups) - 0.5, -0.5))
    legend(axes)
    return figure


def layers(found: Sequence[LayerGain], title: str) -> Figure | None:
    """Plot by how much one more dense layer lowers the loss; None without results.

    There is one panel for each row and each attention that a dense layer is added to.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[LayerGain]] = {}
    for item in found:
        groups.setdefault((item.row, item.attention, item.base), []).append(item)
    if not groups:
        return None
    figure, panels = subplots(len(groups), 1, size=(9, 0.4 + 3.2 * len(groups)), squeeze=False)
    for number, (axes, ((row, attention, base), items)) in enumerate(zip(panels[:, 0], groups.items(), strict=True)):
        items = sorted(items, key=lambda item: item.layer)
        gains, colour = [item.gain for item in items], OKABE_ITO[number % len(OKABE_ITO)]
        heights, names = [gain.value for gain in gains], [str(item.layer) for item in items]
        axes.bar(names, heights, yerr=_errors(gains), color=colour, capsize=2)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(False, axis="x")
        about = f"{title}; {row} under {attention}; other dense layers: {', '.join(map(str, base)) or 'none'}"
        entitle(axes, "Fall of the answer loss if one more layer is dense", f"{about}; bars: 95 % CI")
        axes.set(xlabel="layer that is dense", ylabel="fall of the answer loss\n(nats per token)")
    return figure


def training_curves(lines: Sequence[Line], window: int = 20) -> Figure:
    """Plot the answer loss of each training as a moving average over batches; the seeds of a row share a colour."""
    figure, axes = subplots(1, 1, size=(7, 4))
    shown = [line for line in lines if line["kind"] == "training" and line.get("losses")]
    for number, row in enumerate(dict.fromkeys(line["row"] for line in shown)):
        # One legend entry per row: matplotlib hides labels that start with an underscore.
        label = row
        for line in (line for line in shown if line["row"] == row):
            means = pd.Series(line["losses"]).rolling(window, min_periods=1).mean()
            axes.plot(means.index + 1, means, color=OKABE_ITO[number % len(OKABE_ITO)], label=label)
            label = f"_{row}"
    entitle(axes, "Answer loss during training", f"moving average of {window} batches; one line per seed")
    axes.set(xlabel="batch", ylabel="answer loss (nats per token)")
    if shown:
        legend(axes, "trained")
    else:
        axes.text(0.5, 0.5, "the results have no losses of single batches", ha="center", transform=axes.transAxes)
    return figure


def lines_of(
    axes: Axes,
    found: Sequence[tuple[str, float, Estimate]],
    of: str = "trained",
    *,
    joined: bool = True,
    intervals: bool = True,
) -> None:
    """Draw a line for each name through its estimates (name, x, estimate), with or without ``intervals``.

    If not ``joined``, the estimates are drawn as separate points, side by side.
    """
    names = list(dict.fromkeys(name for name, *_ in found))
    for number, row in enumerate(names):
        apart = 0.0 if joined else 0.4 * ((number + 0.5) / len(names) - 0.5)
        places, scores = zip(*sorted((x + apart, score) for name, x, score in found if name == row), strict=True)
        values, form = [score.value for score in scores], f"{_MARKERS[number % len(_MARKERS)]}{'-' * joined}"
        errors = _errors(scores) if intervals else None
        axes.errorbar(places, values, errors, fmt=form, capsize=3, label=row, alpha=0.85)
    legend(axes, of)


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above; at least 0, because rounding may flip an empty interval's ends."""
    below = [max(0.0, estimate.value - estimate.low) for estimate in estimates]
    above = [max(0.0, estimate.high - estimate.value) for estimate in estimates]
    return [below, above]
