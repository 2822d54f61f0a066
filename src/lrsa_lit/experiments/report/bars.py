"""Targets of a study (its ``bars``), and whether the results reach them.

A bar sets one of four targets on a data set's test split:

- ``kept`` (or ``pairs``) and ``of_dense``: the best LRSA-trained row under LRSA that keeps (or attends to) at most this
  share of the pairs must reach the share ``of_dense`` of dense training's score with dense inference. ``reference``
  restricts the dense rows, and ``reference_at_least`` requires minimum scores of them, since a share of a weak model's
  score is easily reached. Rows with fewer seeds than the study has do not count if other rows have all of them.
- ``row``, ``inference`` and ``at_least``: a minimum score of one cell, or of the best of several rows.
- ``row``, ``inference``, ``of`` and ``at_least``: a minimum share of the score of another cell ``[row, inference]``, or
  of the best of several, on common seeds and questions. The best of several rows counts; with ``cache``, only rows that
  hold at most this share of a dense cache's bytes.
- ``row``, ``inference``, ``above`` and ``p``: a score above those of other cells ``[row, inference]``, by paired tests
  adjusted by Holm's method. With ``draw_seeds: true``, seeds are resampled like questions; this needs two or more.

``aim`` is a score or share beyond the requirement that one hopes to reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lrsa_lit.errors import UserError
from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate
from lrsa_lit.experiments.checks import bar_of, bar_rows
from lrsa_lit.experiments.report import columns
from lrsa_lit.experiments.report.cells import Cell, Cells, reference_of
from lrsa_lit.experiments.report.columns import Column, Grid
from lrsa_lit.experiments.report.tables import LABELS
from lrsa_lit.experiments.study import DENSE, Settings
from lrsa_lit.ops.sparse_attention import LagRelative

_HALF_A_PERCENT = 0.005
"""Tolerance of shares, which tables show as whole percents."""
_OVER_SEEDS = " over questions and seeds"


class Best(NamedTuple):
    """The best cell that a bar allows, and the cell that it is compared with.

    Attributes:
        cell: the best cell.
        reference: the cell that it is compared with, such as dense training.
        same: the reference's row under the cell's attention, with the reference's seeds, if there are results.
        ratio: the cell's score divided by the reference's.
        candidates: number of cells that the best one was chosen from.
        ratio_apart: the ratio if the cell is chosen on one half of the questions and measured on the other; None for a
            single candidate.
    """

    cell: Cell
    reference: Cell
    same: Cell | None
    ratio: Estimate
    candidates: int
    ratio_apart: float | None


class Verdict(NamedTuple):
    """The verdict on a bar.

    Attributes:
        bar: name of the bar.
        required: the requirement.
        reached: the result; empty without results.
        verdict: met, missed or open, with a note on the interval.
        by: the cells that the result is from.
        best: the cell that was compared with the requirement.
        data_set: the bar's data set.
        asked: the requirement without the names of rows.
        aim: the bar's ``aim``.
    """

    bar: str
    required: str
    reached: str = ""
    verdict: str = "open"
    by: str = ""
    best: Cell | None = None
    data_set: str = ""
    asked: str = ""
    aim: str = ""


class Bars:
    """The bars of a study and all results; raises a UserError if a bar's measure does not exist on its data set."""

    def __init__(self, cells: Cells) -> None:
        self.cells, self.study = cells, cells.study
        for name, bar in self.study.bars.items():
            if (measure := self._scope(bar).measure) == "loss":
                where = f"{self.study.name}: bars.{name}.measure"
                raise UserError(where, measure, "a score of answers, which this data set does not have")

    def verdicts(self) -> list[Verdict]:
        """The verdict on each bar."""
        kinds = {"of_dense": self._of_dense, "of": self._of, "at_least": self._at_least, "above": self._above}
        bars = self.study.bars.items()
        found = [next(of for key, of in kinds.items() if key in bar)(name, bar) for name, bar in bars]
        about = [{"data_set": bar["set"], "asked": self._asked(bar), "aim": _aim(bar)} for _, bar in bars]
        return [item._replace(**more) for item, more in zip(found, about, strict=True)]

    def best(self, bar: Settings) -> Best | None:
        """The cell with the largest share of the score that a bar asks a share of, for example dense training's.

        Only cells with all seeds of the study count, or else those with the most seeds: with few seeds, the best cell
        may just be lucky.
        """
        scope = self._scope(bar)
        pairs = self._of_named(bar, scope) if "of" in bar else self._of_allowed(bar, scope)
        enough = min(len(self.study.seeds), max((len(cell.lines) for cell, _ in pairs), default=0))
        pairs = [pair for pair in pairs if len(pair[0].lines) >= enough]
        if not pairs:
            return None
        cell, reference = max(pairs, key=lambda pair: pair[0].mean(scope.measure) / pair[1].mean(scope.measure))
        if (found := cell.compared(reference, scope.measure)) is None:
            return None
        same = scope.cell(reference.row, cell.attention, cell.key[1], {line["seed"] for line in reference.lines})
        return Best(cell, reference, same, found.ratio, len(pairs), _apart(pairs, scope.measure))

    def summary(self) -> Grid:
        """The best cell of each bar that asks for a share of a score, beside dense training.

        A cell that is the best of several budgets is listed once, at the smallest budget of kept pairs, or else of all
        pairs. Cells with dense inference are left out.
        """
        bars = {name: bar for name, bar in self.study.bars.items() if "of_dense" in bar or "of" in bar}
        found = {name: best for name, bar in bars.items() if (best := self.best(bar)) and best.cell.line["rule"]}
        smallest: dict[tuple[str, ...], str] = {}
        budgets = [name for name in found if "of_dense" in bars[name]]
        for name in sorted(budgets, key=lambda name: ("pairs" in bars[name], bars[name][_kind(bars[name])])):
            smallest.setdefault((*found[name].cell.key, bars[name]["set"]), name)
        shown = {name: best for name, best in found.items() if name in smallest.values() or name not in budgets}
        rows, cells = list(shown.values()), [best.cell for best in shown.values()]
        measures = [self._scope(bars[name]).measure for name in shown]

        def means(title: str, of: Sequence[Cell | None]) -> Column:
            three = zip(of, measures, cells, strict=True)
            return Column(title, [cell and _mean(cell, measure, len(best.lines)) for cell, measure, best in three])

        return Grid(
            [
                Column("", list(shown)),
                Column("measure", [LABELS[measure] for measure in measures]),
                means("dense", [best.reference for best in rows]),
                means("dense-trained, compressed", [best.same for best in rows]),
                means("LRSA-trained, compressed", cells),
                Column("of dense", [best.ratio for best in rows], columns.percent),
                *columns.shares(cells),
                *columns.about(cells)[2:],
            ]
        )

    def _of_allowed(self, bar: Settings, scope: Cells) -> list[tuple[Cell, Cell]]:
        """Each cell that counts, with the dense training that it is compared with."""
        allowed = [cell for cell in scope.cells() if self._counts(bar, cell)]
        return [pair for cell in allowed if (pair := self._with_reference(bar, scope, cell)) is not None]

    def _of_named(self, bar: Settings, scope: Cells) -> list[tuple[Cell, Cell]]:
        """Each cell that a bar names, paired with the best cell of its ``of``, among those with the most seeds."""
        own = [cell for row in bar_rows(bar) if (cell := scope.cell(row, bar["inference"])) and _fits(bar, cell)]
        others = [cell for row, attention in bar_of(bar) if (cell := scope.cell(row, attention)) is not None]
        if not others:
            return []
        other = max(others, key=lambda cell: (len(cell.lines), cell.mean(scope.measure)))
        return [pair for cell in own if (pair := cell.paired(other)) is not None and pair[1].mean(scope.measure)]

    def _counts(self, bar: Settings, cell: Cell) -> bool:
        """Whether a row was trained with selection, selects tokens here, and has at most the bar's share of pairs."""
        row, kind, rule = self.study.row(cell.row), _kind(bar), cell.line["rule"]
        trained = row.steps and row.rule is not None and _selects(row.rule.to_dict())
        chooses = _selects(rule) and len(rule["dense_layers"]) < cell.line["layers"]
        return bool(trained and chooses and getattr(cell, kind) <= bar[kind] + _HALF_A_PERCENT)

    def _with_reference(self, bar: Settings, scope: Cells, cell: Cell) -> tuple[Cell, Cell] | None:
        """A cell, paired with dense training with dense inference; None if the bar does not allow that reference."""
        dense = reference_of(self.study, self.study.row(cell.row))
        if dense is None or dense.name not in bar.get("reference", [dense.name]):
            return None
        reference = scope.cell(dense.name, DENSE, DENSE)
        pair = reference and cell.paired(reference)
        if not pair or not pair[1].mean(scope.measure):
            return None
        asked = bar.get("reference_at_least", {})
        return pair if all(pair[1].mean(name) >= least for name, least in asked.items()) else None

    def _of_dense(self, name: str, bar: Settings) -> Verdict:
        kind = _kind(bar)
        required = f"{bar['of_dense']:.0%} of dense {self._label(bar)}, {bar[kind]:.3g} {kind}"
        asked = bar.get("reference_at_least", {}).items()
        required += "".join(f", dense {LABELS[measure]} at least {least:g}" for measure, least in asked)
        if (best := self.best(bar)) is None:
            return Verdict(name, required)
        cell = best.cell
        by = f"{cell.row} under {cell.attention} (kept {cell.kept:.1%}, pairs {cell.pairs:.1%})"
        by += f", compared with {best.reference.row}, {columns.seeds(len(cell.lines))}{_chosen(best)}"
        return Verdict(name, required, columns.percent(best.ratio), _judged(best.ratio, bar["of_dense"]), by, cell)

    def _at_least(self, name: str, bar: Settings) -> Verdict:
        required, scope = f"{self._label(bar)} at least {bar['at_least']:g}", self._scope(bar)
        found = [cell for row in bar_rows(bar) if (cell := scope.cell(row, bar["inference"])) is not None]
        if not found:
            return Verdict(name, required)
        cell = max(found, key=lambda cell: cell.mean(scope.measure))
        score = cell.estimate(scope.measure)
        by = f"{cell.row} under {cell.attention}, {columns.seeds(len(cell.lines))}"
        by += f"; best of {len(found)}" if len(found) > 1 else ""
        return Verdict(name, required, columns.interval(score), _judged(score, bar["at_least"]), by, cell)

    def _of(self, name: str, bar: Settings) -> Verdict:
        scope, asked, inference = self._scope(bar), bar_of(bar), bar["inference"]
        of = " or ".join(f"{row} under {attention}" for row, attention in asked)
        required = f"{bar['at_least']:.0%} of {self._label(bar)} of {'the best of ' * (len(asked) > 1)}{of}"
        required += f", {bar['cache']:.3g} of dense bytes" if "cache" in bar else ""
        if (best := self.best(bar)) is None:
            held = [cell for row in bar_rows(bar) if (cell := scope.cell(row, inference)) and not _fits(bar, cell)]
            if not held:
                return Verdict(name, required)
            least = min(held, key=lambda cell: cell.cache or 0.0)
            by = f"{least.row} under {inference} holds {columns.share(least.cache or 0.0)} of dense bytes"
            return Verdict(name, required, "cache too large", "**missed**", by, least)
        by = f"{best.cell.row} under {inference}, {columns.seeds(len(best.cell.lines))}{_chosen(best)}"
        verdict = _judged(best.ratio, bar["at_least"])
        return Verdict(name, required, columns.percent(best.ratio), verdict, by, best.cell)

    def _above(self, name: str, bar: Settings) -> Verdict:
        scope, asked = self._scope(bar), bar["above"]
        others = ", ".join(f"{row} under {attention}" for row, attention in asked)
        draw_seeds = bar.get("draw_seeds", False)
        required = f"{self._label(bar)} above {others}, p < {bar['p']:g}{_OVER_SEEDS * draw_seeds}"
        cell = scope.cell(bar["row"], bar["inference"])
        measured = [other for names in asked if (other := scope.cell(*names)) is not None]
        pairs = [pair for other in measured if cell and (pair := cell.paired(other))]
        found = [(item, own) for own, other in pairs if (item := own.compared(other, scope.measure)) is not None]
        if not found:
            return Verdict(name, required)
        items = [item for item, _ in found]
        p_values = statistics.holm([item.p_drawn if draw_seeds else item.p_value for item in items])
        smallest = min((item.difference for item in items), key=lambda difference: difference.value)
        seeds = min(len(own.lines) for _, own in found)
        by = f"{bar['row']} under {bar['inference']}, {columns.seeds(seeds)}; the smallest difference and the largest p"
        by += f" ({len(found)} of {len(asked)} measured)" if len(found) < len(asked) else ""
        verdict = "open" if draw_seeds and seeds < 2 else _significant(items, p_values, bar["p"], len(asked))
        return Verdict(name, required, f"{columns.signed(smallest)}, p = {max(p_values):.4f}", verdict, by, cell)

    def _asked(self, bar: Settings) -> str:
        label = LABELS[self._scope(bar).measure]
        if "above" in bar:
            (row, attention), *more = bar["above"]
            others = f"each of {len(more) + 1}" if more else f"{row} under {attention}"
            return f"{label} above {others}, p < {bar['p']:g}{_OVER_SEEDS * bar.get('draw_seeds', False)}"
        share = bar.get("of_dense", bar.get("at_least"))
        return f"{share:.0%} of {label}" if "of" in bar or "of_dense" in bar else f"{label} of {share:g}"

    def _scope(self, bar: Settings) -> Cells:
        return self.cells.on(bar["set"], measure=bar.get("measure"))

    def _label(self, bar: Settings) -> str:
        return f"{bar['set']} {LABELS[self._scope(bar).measure]}"


def table_of(verdicts: Sequence[Verdict]) -> Grid:
    """A row per bar, with the cells that reached it."""
    fields = {name: name for name in Verdict._fields[:4]} | {"by": "measured on"}
    values = {title: [getattr(item, name) for item in verdicts] for name, title in fields.items()}
    return Grid([Column(title, texts, number=_without_bold) for title, texts in values.items()], names=5)


def claim_of(verdicts: Sequence[Verdict]) -> Grid:
    """A row per bar, with the pairs and cache bytes of its best cell; bars without results are "not run yet".

    The names of rows are only in :func:`table_of`.
    """
    cells = [item.best for item in verdicts]
    return Grid(
        [
            Column("bar", [item.bar for item in verdicts]),
            Column("set", [item.data_set for item in verdicts]),
            Column("required", [item.asked for item in verdicts]),
            Column("aim", [item.aim for item in verdicts]),
            Column("reached", [item.reached for item in verdicts]),
            Column("pairs", [cell and cell.pairs for cell in cells], columns.share),
            Column("cache bytes", [cell and cell.cache for cell in cells], columns.share),
            Column("verdict", [item.verdict if item.reached else "not run yet" for item in verdicts]),
            Column("seeds", [cell and len(cell.lines) for cell in cells]),
        ],
        names=2,
    )


def _without_bold(text: str) -> str:
    return text.replace("**", "")


def _fits(bar: Settings, cell: Cell) -> bool:
    """Whether a cell holds at most the bar's ``cache``; always true for a bar without it."""
    return (cell.cache or 0.0) <= float(bar.get("cache", 1.0)) + _HALF_A_PERCENT


def _chosen(best: Best) -> str:
    """A note with the ratio when the best of several cells is chosen on other questions."""
    if best.ratio_apart is None:
        return ""
    return f"; best of {best.candidates}, {best.ratio_apart:.1%} if chosen on other questions"


def _kind(bar: Settings) -> str:
    """Which pairs a bar counts: ``kept`` pairs, or all ``pairs`` attended to."""
    return "kept" if "kept" in bar else "pairs"


def _aim(bar: Settings) -> str:
    if (aim := bar.get("aim")) is None:
        return ""
    return f"{aim:.0%}" if "of" in bar else f"{aim:g}"


def _selects(rule: Settings | None) -> bool:
    """Whether a rule keeps tokens by the lag-relative score; with top_k 0 it is only a control."""
    if not rule or rule.get("system"):
        return False
    return bool(rule["top_k"] and rule["compressor"]["class_path"].endswith(f".{LagRelative.__name__}"))


def _mean(cell: Cell, measure: str, seeds: int) -> str:
    """A cell's score, with its number of seeds if it has fewer than ``seeds``."""
    fewer = f" ({columns.seeds(len(cell.lines))})" if len(cell.lines) < seeds else ""
    return f"{cell.mean(measure):.3f}{fewer}"


def _judged(found: Estimate, required: float) -> str:
    """The verdict on a score: the value decides; a note says if the interval includes the other verdict.

    If all questions have the same score, the bootstrap interval is empty; the error is then unknown, not zero.
    """
    if found.value >= required:
        return "met" if found.low >= required and found.high > found.low else "met, not significantly"
    return "**missed**" if found.high < required else "**missed**, not significantly"


def _significant(found: Sequence[Comparison], p_values: Sequence[float], level: float, asked: int) -> str:
    above = [item.difference.value > 0 and p < level for item, p in zip(found, p_values, strict=True)]
    if not all(above):
        return "**missed**"
    if len(found) < asked:
        return "open"
    return "met" if all(item.difference.low > 0 for item in found) else "met, not significantly over seeds"


def _apart(pairs: Sequence[tuple[Cell, Cell]], measure: str) -> float | None:
    """The ratio when the cell is chosen on one half of the questions and measured on the other, for both halves."""
    cells = [pair for pair in pairs if pair[0].line["set_digest"] == pairs[0][0].line["set_digest"]]
    groups = cells[0][0].groups
    numbers = np.arange(cells[0][0].line["questions"]) if groups is None else groups
    halves = [numbers % 2 == half for half in (0, 1)]
    if len(cells) < 2 or not all(half.any() for half in halves):
        return None
    sums = np.array([[[side.scores(measure).mean(axis=0)[half].sum() for half in halves] for side in pair]
                     for pair in cells])  # fmt: skip
    if not sums[:, 1].all():
        return None
    chosen = (sums[:, 0] / sums[:, 1]).argmax(axis=0)[::-1]
    reached, dense = sums[chosen, :, [0, 1]].sum(axis=0)
    return float(reached / dense)
