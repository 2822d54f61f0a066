"""Figures and coloured text for notebooks and MLflow runs.

Each figure has a title that says what it shows, and often a smaller line that names the run. Shares are shaded from
white (0) to dark (1). Lines and boxes use Okabe and Ito's palette, which colour-blind readers can distinguish. Figures
are made without pyplot, which would keep them all in memory during training.

Dimensions: N layers with LRSA, H key-value heads, T tokens.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from lrsa_lit.analysis import metrics
from lrsa_lit.analysis.record import SelectionRecord
from lrsa_lit.run_labels import title_of_run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

SCORES = (-0.02, 1.02)
"""Axis limits for scores or shares: 0 to 1, with room for points at both ends."""
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WHITE, _DARK = "#ffffff", "#00204c"
_SHADES = LinearSegmentedColormap.from_list("kept", [_WHITE, _DARK])
_UNCOMPRESSED, _EDGE, _GREY = "#e8e8e8", "#a0a0a0", "#555555"
_GOLD, _ANSWER = OKABE_ITO[4], OKABE_ITO[1]
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#e4e4e4",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
"""What all figures look like."""


def context_html(record: SelectionRecord, index: int = 0) -> str:
    """A sample's text as HTML with a legend; the more heads of all layers kept a token, the darker it is.

    Tokens that no head kept are white. Tokens that are not subject to selection (sinks and the raw window) are grey and
    italic. Gold passages and answers are boxed; answers are also bold.
    """
    sample = record.samples[index]
    region = record.compressed(sample)
    share = np.full(len(sample.token_ids), np.nan)
    share[region] = record.kept(sample).mean(axis=(0, 1))
    words = [_word(text, share[t]) for t, text in enumerate(record.tokens(sample))]
    gold, answers = _numbered(sample.gold_spans, len(words)), _numbered(sample.answer_spans, len(words))
    parts = []
    for passage, places in itertools.groupby(range(len(words)), gold.__getitem__):
        inner = []
        for answer, within in itertools.groupby(places, answers.__getitem__):
            text = "".join(words[t] for t in within)
            inner.append(_boxed(text, _ANSWER, "; font-weight: bold") if answer else text)
        parts.append(_boxed("".join(inner), _GOLD) if passage else "".join(inner))
    # Its own background, because a notebook's page may be dark.
    return f'{_LEGEND}<div style="{_CARD}; white-space: pre-wrap; line-height: 1.9">{"".join(parts)}</div>'


def positions(record: SelectionRecord, index: int = 0) -> Figure:
    """Plot, by layer and position, the share of a layer's heads that kept a token.

    Gold passages and answers are boxed, and also marked above the plot, because narrow boxes are hard to see.
    """
    sample = record.samples[index]
    region = record.compressed(sample)
    shares = record.kept(sample).mean(axis=1)
    layers = record.layers
    height = 1.2 + max(1.2, 0.16 * len(layers))
    figure, (marks, axes) = subplots(2, 1, size=(10, height), gridspec_kw={"height_ratios": [1, 4]}, sharex=True)
    marks.grid(False)
    axes.grid(False)
    if region.stop > region.start:
        extent = (region.start - 0.5, region.stop - 0.5, len(layers) - 0.5, -0.5)
        # With more tokens than pixels (about 800), show their mean; otherwise do not blur between layers.
        smooth = "auto" if len(sample.token_ids) > 800 else "nearest"
        scale = {"cmap": _SHADES, "vmin": 0, "vmax": 1}
        image = axes.imshow(shares, aspect="auto", extent=extent, interpolation=smooth, **scale)
        figure.colorbar(image, ax=[marks, axes], label="share of the layer's heads")
    # Hatched, because a small share would look the same.
    axes.patch.set(facecolor=_UNCOMPRESSED, edgecolor=_EDGE, hatch="////")
    axes.set(xlim=(-0.5, len(sample.token_ids) - 0.5), ylim=(len(layers) - 0.5, -0.5))
    axes.set(xlabel="position in the prompt (tokens)", ylabel="layer")
    _name_layers(axes.yaxis, layers)
    boxes = {"gold passage": (sample.gold_spans, _GOLD), "answer": (sample.answer_spans, _ANSWER)}
    for row, (spans, colour) in enumerate(boxes.values()):
        marks.broken_barh([(start - 0.5, end - start) for start, end in spans], (row - 0.4, 0.8), color=colour)
        for start, end in spans:
            # Clipping at the axes would hide half of the upper and lower lines.
            box = Rectangle((start - 0.5, -0.5), end - start, len(layers), fill=False, clip_on=False)
            box.set(edgecolor=colour, linewidth=1 + 0.3 * row)
            axes.add_patch(box)
    marks.set_yticks([0, 1], list(boxes))
    marks.set_ylim(1.6, -0.6)
    marks.spines[:].set_visible(False)
    marks.tick_params(length=0, labelbottom=False)
    entitle(marks, "Share of heads that kept each token, by layer", f"{_name(record)}; sample {sample.id}")
    shown = [Patch(facecolor="none", edgecolor=colour, label=name) for name, (_, colour) in boxes.items()]
    shown.append(Patch(facecolor=_WHITE, edgecolor=_EDGE, label="kept by no head"))
    shown.append(Patch(facecolor=_UNCOMPRESSED, edgecolor=_EDGE, hatch="////", label="never compressed"))
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=10)
    return figure


def survival_by_layer(records: Sequence[SelectionRecord]) -> Figure:
    """Plot the share of the evidence that each layer's heads keep on average, one line per record, with chance."""
    figure, panels = subplots(1, 2, size=(10, 3.4), sharey=True)
    shown: dict[metrics.Evidence, str] = {"gold": "gold passages", "answer": "answers"}
    names, about = _apart(records)
    for axes, (evidence, title) in zip(panels, shown.items(), strict=True):
        found = [metrics.survival(record, evidence) for record in records]
        for record, kept, name in zip(records, found, names, strict=True):
            axes.plot(record.layers, kept.by_head.mean(axis=1), "o-", markersize=3, label=name)
        _mark_chance(axes, records)
        axes.set(xlabel="layer")
        axes.set_title(f"{title} ({found[0].tokens:,} tokens)", loc="left", fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("Share of the evidence that is kept, by layer", x=0, ha="left", fontsize=12, fontweight="bold")
    panels[0].set_ylabel("kept share (mean of heads)")
    panels[0].set_ylim(SCORES)
    legend(panels[1], about)
    return figure


def by_place(records: Sequence[SelectionRecord]) -> Figure:
    """Plot the kept share of tokens along a partition: the mean over layers, and a band from minimum to maximum."""
    figure, axes = subplots(1, 1, size=(8, 3.6))
    names, about = _apart(records)
    for record, name in zip(records, names, strict=True):
        parts = min(32, record.rule["lag_size"])
        places, shares = (np.arange(parts) + 0.5) / parts, metrics.by_place(record, parts)
        (line,) = axes.plot(places, shares.mean(axis=0), label=name)
        span = shares.min(axis=0), shares.max(axis=0)
        axes.fill_between(places, *span, color=line.get_color(), alpha=0.15, linewidth=0)
    _mark_chance(axes, records)
    entitle(axes, "Kept share of tokens, by place in the partition", "line: mean of the layers; band: all layers")
    axes.set(xlabel="place in the partition (0: first token, 1: last)", ylabel="kept share of tokens", xlim=(0, 1))
    axes.set_ylim(SCORES)
    legend(axes, about)
    return figure


def kinds(records: Sequence[SelectionRecord]) -> Figure:
    """Plot the kinds of kept tokens beside those of all tokens (a token may have several kinds)."""
    figure, axes = subplots(1, 1, size=(8, 3.4))
    names, about = _apart(records)
    columns = {"all tokens": metrics.kinds_kept(records[0])[0]}
    columns |= {f"kept, {name}": metrics.kinds_kept(each)[1] for each, name in zip(records, names, strict=True)}
    width = 0.8 / len(columns)
    for number, (label, values) in enumerate(columns.items()):
        places = np.arange(len(values)) + (number - (len(columns) - 1) / 2) * width
        axes.bar(places, values, width, color=None if number else OKABE_ITO[-1], label=label)
    axes.set_xticks(range(len(metrics.KINDS)), metrics.KINDS)
    axes.grid(False, axis="x")
    entitle(axes, "Kinds of the kept tokens, beside all tokens", "a token may be of several kinds")
    axes.set(xlabel="kind of the token's word", ylabel="share of the tokens", ylim=SCORES)
    legend(axes, about)
    return figure


def agreement(record: SelectionRecord) -> Figure:
    """Plot Cohen's kappa between the heads of each pair of layers; on the diagonal, between heads of one layer."""
    means = metrics.agreement(record)
    figure, axes = subplots(1, 1, size=(6, 4.6))
    axes.grid(False)
    image = axes.imshow(means, cmap="cividis", vmin=min(0.0, float(np.nanmin(means, initial=0))))
    figure.colorbar(image, ax=axes, label="Cohen's kappa (0: chance, 1: the same tokens)")
    for axis in (axes.xaxis, axes.yaxis):
        _name_layers(axis, record.layers)
    entitle(axes, "Agreement between the heads of two layers", _name(record))
    axes.set(xlabel="layer", ylabel="layer")
    return figure


def change(first: SelectionRecord, second: SelectionRecord) -> Figure:
    """Plot, by layer, how well each head's selections in two records agree.

    Raises:
        UserError: the records have different models or samples.
    """
    kappa = metrics.agreement_between(first, second)
    figure, axes = subplots(1, 1, size=(8, 3.4))
    for head, shares in enumerate(kappa.T):
        axes.plot(first.layers, shares, "o", color=OKABE_ITO[0], alpha=0.6, label=None if head else "a head")
    axes.plot(first.layers, kappa.mean(axis=1), "-", color=OKABE_ITO[1], label="mean of the layer")
    axes.axhline(0, linestyle=":", color="grey", label="chance")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    (one, other), about = _apart([first, second])
    names = f"{about}{', ' if about else ''}{one} against {other}"
    entitle(axes, "Does each head keep the same tokens in both records?", f"{names}; 1: the same, 0: chance")
    axes.set(xlabel="layer", ylabel="Cohen's kappa")
    axes.set_ylim(min(SCORES[0], axes.get_ylim()[0]), SCORES[1])
    legend(axes)
    return figure


def gates(values: Sequence[Sequence[float]], title: str) -> Figure:
    """Plot DuoAttention's gates (N, H) by layer and head, from 0 (sinks and recent tokens) to 1 (everything)."""
    layers, heads = len(values), len(values[0])
    figure, axes = subplots(1, 1, size=(2.5 + 0.25 * heads, 1.5 + 0.16 * layers))
    axes.grid(False)
    image = axes.imshow(values, cmap=_SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="gate (0: recent tokens, 1: all)")
    _name_layers(axes.yaxis, range(layers))
    _name_layers(axes.xaxis, range(heads))
    entitle(axes, "Gates of the heads", title)
    axes.set(xlabel="key-value head", ylabel="layer")
    return figure


def f1_against(rules: pd.DataFrame, column: str, label: str) -> Figure:
    """Plot F1 with its interval against a column of :func:`~lrsa_lit.analysis.runs.by_rule`.

    ``label`` is the column's name, with its unit or symbol in parentheses.
    """
    figure, axes = subplots(1, 1, size=(8, 3.8))
    lines = rules.dropna(subset=[column]).sort_values(column).groupby(["model", "lag_size"], dropna=False)
    for (model, lag_size), line in lines:
        errors = np.stack([line["f1"] - line["f1_low"], line["f1_high"] - line["f1"]])
        axes.errorbar(line[column], line["f1"], errors, fmt="o-", capsize=3, label=title_of_run(model, lag_size))
        for _, row in line.dropna(subset=["top_k"]).iterrows():
            axes.annotate(f"K{row['top_k']:g}", (row[column], row["f1"]), xytext=(5, 4), textcoords="offset points")
    entitle(axes, f"F1 by {label.partition(' (')[0]}", "bars: 95 % CI over seeds and questions")
    axes.set(xlabel=label, ylabel="F1", ylim=SCORES)
    if lines.ngroups:
        legend(axes)
    else:
        axes.text(0.5, 0.5, f"no run recorded {column}", ha="center", transform=axes.transAxes)
    return figure


def differences(pairs: pd.DataFrame) -> Figure:
    """Plot the paired :func:`~lrsa_lit.analysis.runs.differences`; intervals that include 0 may be chance."""
    figure, axes = subplots(1, 1, size=(8, 1.6 + 0.35 * len(pairs)))
    rows = np.arange(len(pairs))
    errors = np.stack([pairs["mean"] - pairs["low"], pairs["high"] - pairs["mean"]])
    axes.errorbar(pairs["mean"], rows, xerr=errors, fmt="o", capsize=3, color=OKABE_ITO[0])
    axes.axvline(0, linestyle=":", color="grey")
    names = [[name.split(" ") for name in pairs[side]] for side in ("first", "second")]
    # The model's name would take most of the figure.
    columns = zip(*(words[:-1] for side in names for words in side), strict=False)
    shared = [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, columns)]
    apart = [[" ".join(words[len(shared) :]) for words in side] for side in names]
    axes.set_yticks(rows, [f"{one} minus {other}" for one, other in zip(*apart, strict=True)])
    about = "bars: 95 % CI; one that includes 0 may be chance"
    entitle(axes, "Differences in F1 on the same questions", "; ".join(filter(None, (" ".join(shared), about))))
    axes.set(xlabel="difference in F1", ylim=(len(pairs) - 0.5, -0.5))
    return figure


def subplots(rows: int, columns: int, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """Like ``pyplot.subplots``, without pyplot and in the style of all figures; ``size`` is in inches."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, **options)
    for axes in figure.axes:
        axes.set_prop_cycle(color=OKABE_ITO)
    return figure, panels


def entitle(axes: Axes, title: str, about: str = "") -> None:
    """Add a title that says what is shown, and below it in grey a line about it, such as the run."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22 if about else 7)
    fraction, points = "axes fraction", "offset points"
    axes.annotate(about, (0, 1), (0, 7), fraction, points, annotation_clip=False, color=_GREY, fontsize=10)


def legend(axes: Axes, title: str | None = None) -> None:
    """Add a legend beside the axes."""
    beside = axes.legend(title=title, frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
    beside.set_alignment("left")
    beside.get_title().set_fontsize(10)


def _name_layers(axis: Axis, layers: Sequence[int]) -> None:
    ticks = range(0, len(layers), max(1, len(layers) // 8))
    axis.set_ticks(list(ticks), [str(layers[tick]) for tick in ticks])


def _mark_chance(axes: Axes, records: Sequence[SelectionRecord]) -> None:
    """Draw a line at each K/L of the records, the share that heads with random selection keep."""
    for chance in sorted({record.chance for record in records}):
        axes.axhline(chance, linestyle=":", color="grey", label=f"chance, K/L = {chance:g}")


def _apart(records: Sequence[SelectionRecord]) -> tuple[list[str], str]:
    """Names of records that differ, and what they have in common: the model and the rule, or nothing."""
    names = [_name(record) for record in records]
    shared = {name.rpartition(", ")[0] for name in names}
    return ([name.rpartition(", ")[2] for name in names], shared.pop()) if len(shared) == 1 else (names, "")


def _name(record: SelectionRecord) -> str:
    return f"{record.model} L{record.rule['lag_size']} K{record.rule['top_k']}, step {record.step}"


def _numbered(spans: Sequence[tuple[int, int]], length: int) -> list[int]:
    """For each token, the number of its span, from 1; 0 outside of all spans."""
    numbers = [0] * length
    for number, (start, end) in enumerate(spans, 1):
        numbers[start:end] = [number] * (min(end, length) - start)
    return numbers


def _word(text: str, share: float) -> str:
    """One token as escaped HTML."""
    if np.isnan(share):
        style, kept = f"background: {_UNCOMPRESSED}; color: #555; font-style: italic", "never compressed"
    else:
        style = f"background: {to_hex(_SHADES(share))}; color: {'#fff' if share > 0.6 else '#000'}"
        kept = f"kept by {share:.0%} of the heads"
    return f'<span style="{style}" title="{kept}">{html.escape(text)}</span>'


def _boxed(inner: str, colour: str, more: str = "") -> str:
    """HTML in a box that continues over line breaks."""
    box = f"border: 2px solid {colour}; border-radius: 3px"
    goes_on = "-webkit-box-decoration-break: clone; box-decoration-break: clone"
    return f'<span style="{box}; {goes_on}{more}">{inner}</span>'


_CARD = f"background: {_WHITE}; color: #000; padding: 0.4em 0.8em"
_BAR = f"background: linear-gradient(to right, {_WHITE}, {_DARK}); border: 1px solid {_EDGE}"
_LEGEND = (
    f'<div style="{_CARD}">heads that kept a token: '
    f'none <span style="{_BAR}; display: inline-block; width: 8em; height: 0.9em"></span> all'
    f" &emsp; {_boxed('gold passage', _GOLD)} &emsp; {_boxed('answer', _ANSWER, '; font-weight: bold')}"
    f' &emsp; <span style="background: {_UNCOMPRESSED}; color: #555; font-style: italic">sinks and raw window</span>'
    " (all heads see them)</div>"
)
"""Legend of the colours and boxes of a text."""
