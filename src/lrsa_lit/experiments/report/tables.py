"""Tables of a part's scores, and of all trainings and machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate
from lrsa_lit.experiments.report import columns
from lrsa_lit.experiments.report.cells import Entry, Table
from lrsa_lit.experiments.report.columns import Column, Grid
from lrsa_lit.experiments.results import Line

LABELS = {"f1": "F1", "recall": "recall", "em": "exact match", "loss": "perplexity"}

SHARES = """\
*kept* is K/L in sparse layers and 1 in dense ones. *pairs* is the share of query-key pairs attended to, including sinks
and windows."""

LEGEND = f"""\
Brackets are 95 % bootstrap confidence intervals over questions; questions about the same text are resampled together.
With several seeds, seeds are resampled as well. Comparisons use the seeds that both sides have. Seeds differ in the
order of the data. The interval of a single seed does not cover the variation between trainings.

{SHARES} *of dense* is the score divided by that of dense training with dense inference, which was trained for as many
steps on the same data, at the learning rate chosen for dense training. *minus dense-trained* is the difference to dense
training under the same attention. *p* is from a paired permutation test over the questions; *p (Holm)* is adjusted for
all tests in the column. The tests tell whether these trained models differ, not whether other trainings would. *gold
kept* is the share of the supporting passages' tokens that a head of a sparse layer keeps, over the first 16
questions."""


def matrix(table: Table) -> Grid:
    """A row per training and a column per attention: the score, and its ratio to dense training."""
    rows: dict[str, int] = {}
    for cell in table.cells:
        rows[cell.row] = max(rows.get(cell.row, 0), len(cell.lines))

    def value(entry: Entry) -> Estimate:
        return entry.score.exp() if table.measure == "loss" else entry.score

    def shown(entry: Entry) -> str:
        if table.measure == "loss":
            return columns.hundredths(value(entry))
        return columns.interval(entry.score) + (f"\n{columns.percent(entry.of_dense.ratio)}" if entry.of_dense else "")

    scores = [Column(name, [table.entry(row, name) for row in rows], shown, value) for name in table.attentions]
    return Grid([Column("trained", list(rows)), Column("seeds", list(rows.values())), *scores], names=1)


def full(table: Table) -> Grid:
    """A row per cell, with all scores and comparisons."""
    cells, scores = table.cells, [entry.score for entry in table.entries]
    shown = [*columns.about(cells), *columns.shares(cells)]
    if table.measure == "loss":
        perplexities = Column("perplexity", [score.exp() for score in scores], columns.hundredths)
        return Grid([*shown, Column("loss", scores, columns.interval), perplexities])
    means = [float(cell.scores("loss").sum() / cell.scores("tokens").sum()) for cell in cells]
    ratios = [entry.of_dense.ratio if entry.of_dense else None for entry in table.entries]
    shown += [
        Column(LABELS[table.measure], scores, columns.interval),
        Column("exact match", [cell.mean("em") for cell in cells], "{:.3f}".format),
        Column("loss", means, "{:.3f}".format),
        Column("of dense", ratios, columns.percent),
        Column("gold kept", [cell.survival("gold") for cell in cells], columns.share),
        *_differences("dense-trained", [entry.of_same for entry in table.entries]),
    ]
    if table.against:
        shown += _differences(", ".join(table.against), [entry.of_named for entry in table.entries])
    return Grid(shown)


def _differences(title: str, found: Sequence[Comparison | None]) -> list[Column]:
    p_values = [item and item.p_value for item in found]
    adjusted = iter(statistics.holm([p_value for p_value in p_values if p_value is not None]))
    p_value = "{:.4f}".format
    return [
        Column(f"minus {title}", [item and item.difference for item in found], columns.signed),
        Column("p", p_values, p_value),
        Column("p (Holm)", [item and next(adjusted) for item in found], p_value),
    ]


def training(lines: Sequence[Line]) -> Grid:
    """Loss, speed, memory and time of each training, averaged over its seeds."""
    rows = _grouped((line for line in lines if line["kind"] == "training"), lambda line: line["row"])
    groups = list(rows.values())

    def means(title: str, name: str, form: str, unit: float = 1) -> Column:
        known = [[line[name] for line in own if line.get(name) is not None] for own in groups]
        means = [math.fsum(values) / len(values) / unit if values else None for values in known]
        return Column(title, means, f"{{:{form}}}".format)

    return Grid(
        [
            Column("trained", list(rows)),
            Column("seeds", list(map(len, groups))),
            Column("steps", [_listed(line["steps"] for line in own) for own in groups]),
            means("loss (last 20 steps)", "loss_of_last_20_steps", ".3f"),
            means("tokens/s", "tokens_per_second", ",.0f"),
            means("peak memory (GiB)", "peak_memory_bytes", ".1f", 2**30),
            means("minutes", "seconds", ".1f", 60),
        ],
        names=1,
    )


def machines(lines: Sequence[Line]) -> Grid:
    """The devices and versions with which the results were made, and the hours that they took."""
    rows = _grouped(
        lines, lambda line: tuple((name, str(of)) for name, of in line["machine"].items() if name != "commit")
    )
    groups = list(rows.values())
    versions = [", ".join(f"{name} {value}" for name, value in about if name != "device" and value != "None")
                for about in rows]  # fmt: skip
    trainings = [sum(line["kind"] == "training" for line in own) for own in groups]
    return Grid(
        [
            Column("device", [dict(about)["device"] for about in rows]),
            Column("versions", versions),
            Column("commits", [_listed(line["machine"].get("commit") for line in own) for own in groups]),
            Column("seeds", [_listed(sorted(line["seed"] for line in own)) for own in groups]),
            Column("trainings", trainings),
            Column("evaluations", [len(own) - trained for own, trained in zip(groups, trainings, strict=True)]),
            Column("hours", list(map(_hours, groups))),
        ],
        names=4,
    )


def _grouped(lines: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _hours(lines: Sequence[Line]) -> str | None:
    known = [line["seconds"] for line in lines if line.get("seconds") is not None]
    counted = "" if len(known) == len(lines) else f" (from {len(known)} of {len(lines)} results)"
    return f"{math.fsum(known) / 3600:.1f}{counted}" if known else None
