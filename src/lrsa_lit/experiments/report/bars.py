"""What a study must reach, as its ``bars`` say, and what it has reached.

A bar asks for one of four things on a data set's test split:

- ``kept`` (or ``pairs``) and ``of_dense``: that the best LRSA-trained row under LRSA that keeps (or attends to) no more
  than this share of the pairs reaches so much of the score of dense training with dense inference, and, where they are
  given, only of the dense rows in ``reference`` with the scores of ``reference_at_least``, since a share of a weak
  model is easily reached; rows with fewer seeds than the study's do not count where others have them;
- ``row``, ``inference`` and ``at_least``: a score of one cell, or of the best of several rows;
- ``row``, ``inference``, ``of`` and ``at_least``: so much of the score of another cell, ``[row, inference]``, or of the
  best of several, by seeds and questions that both have; of several rows the best one counts, and with ``cache`` only
  those that hold no more than this share of a dense cache's bytes;
- ``row``, ``inference``, ``above`` and ``p``: a score above those of other cells, each ``[row, inference]``, by paired
  tests adjusted by Holm's method; with ``draw_seeds: true`` seeds are drawn as questions are, of which there must be
  two or more.

``aim`` is what a score or share is hoped to reach beyond what is required.
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
"""Shares are held against a bar's as whole percents, as the tables show them."""


class Best(NamedTuple):
    """The best cell of so many candidates that a bar allows, and the dense training that it is held against.

    Attributes:
        same: dense training under the cell's attention, of the reference's seeds, if there are results.
        ratio: of the cell's score by the reference's.
        ratio_apart: the same when the cell is chosen on one half of the questions and measured on the other; None for
            a single candidate.
    """

    cell: Cell
    reference: Cell
    same: Cell | None
    ratio: Estimate
    candidates: int
    ratio_apart: float | None


class Verdict(NamedTuple):
    """A bar, what it requires, what was reached (nothing without results), the verdict, and which cells reached it.

    Attributes:
        best: the cell that was held against the bar.
        data_set: what it is about.
        asked: what it requires, without the names of rows.
        aim: what is hoped for.
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
    """The bars of a study, held against all results; a UserError if one names what the study does not have."""

    def __init__(self, cells: Cells) -> None:
        self.cells, self.study = cells, cells.study
        for name, bar in self.study.bars.items():
            if (measure := self._scope(bar).measure) == "loss":
                where = f"{self.study.name}: bars.{name}.measure"
                raise UserError(where, measure, "a score of answers, which this data set does not have")

    def verdicts(self) -> list[Verdict]:
        """One for each bar."""
        kinds = {"of_dense": self._of_dense, "of": self._of, "at_least": self._at_least, "above": self._above}
        bars = self.study.bars.items()
        found = [next(of for key, of in kinds.items() if key in bar)(name, bar) for name, bar in bars]
        about = [{"data_set": bar["set"], "asked": self._asked(bar), "aim": _aim(bar)} for _, bar in bars]
        return [item._replace(**more) for item, more in zip(found, about, strict=True)]

    def best(self, bar: Settings) -> Best | None:
        """The cell with the largest share of dense training's score, or what else a bar asks a share of.

        Of those that the bar allows or names only the ones of as many seeds as the study has, or else of the most: of
        one seed the best is the luckiest.
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
        """The best of each budget, and of each share that is asked of it, beside dense training.

        What is the best of several budgets stands once: at the smallest one of kept pairs, else of all pairs. Dense
        inference has no budget.
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
        """Each cell that counts, and the dense training that it is held against."""
        allowed = [cell for cell in scope.cells() if self._counts(bar, cell)]
        return [pair for cell in allowed if (pair := self._with_reference(bar, scope, cell)) is not None]

    def _of_named(self, bar: Settings, scope: Cells) -> list[tuple[Cell, Cell]]:
        """Each cell that a bar names, and the best of those that it asks a share of, of as many seeds as any has."""
        own = [cell for row in bar_rows(bar) if (cell := scope.cell(row, bar["inference"])) and _fits(bar, cell)]
        others = [cell for row, attention in bar_of(bar) if (cell := scope.cell(row, attention)) is not None]
        if not others:
            return []
        other = max(others, key=lambda cell: (len(cell.lines), cell.mean(scope.measure)))
        return [pair for cell in own if (pair := cell.paired(other)) is not None and pair[1].mean(scope.measure)]

    def _counts(self, bar: Settings, cell: Cell) -> bool:
        """Whether a row was trained to choose tokens, does so here, and keeps no more pairs than the bar says."""
        row, kind, rule = self.study.row(cell.row), _kind(bar), cell.line["rule"]
        trained = row.steps and row.rule is not None and _selects(row.rule.to_dict())
        chooses = _selects(rule) and len(rule["dense_layers"]) < cell.line["layers"]
        return bool(trained and chooses and getattr(cell, kind) <= bar[kind] + _HALF_A_PERCENT)

    def _with_reference(self, bar: Settings, scope: Cells, cell: Cell) -> tuple[Cell, Cell] | None:
        """A cell and dense training with dense inference that it is held against, if the bar allows that one."""
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
        by += f", against {best.reference.row}, {columns.seeds(len(cell.lines))}{_chosen(best)}"
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
            return Verdict(name, required, "holds too much", "**missed**", by, least)
        by = f"{best.cell.row} under {inference}, {columns.seeds(len(best.cell.lines))}{_chosen(best)}"
        verdict = _judged(best.ratio, bar["at_least"])
        return Verdict(name, required, columns.percent(best.ratio), verdict, by, best.cell)

    def _above(self, name: str, bar: Settings) -> Verdict:
        scope, asked = self._scope(bar), bar["above"]
        others = ", ".join(f"{row} under {attention}" for row, attention in asked)
        draw_seeds = bar.get("draw_seeds", False)
        required = f"{self._label(bar)} above {others}, p < {bar['p']:g}{' with seeds drawn' * draw_seeds}"
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
            return f"{label} above {others}, p < {bar['p']:g}{' with seeds drawn' * bar.get('draw_seeds', False)}"
        share = bar.get("of_dense", bar.get("at_least"))
        return f"{share:.0%} of {label}" if "of" in bar or "of_dense" in bar else f"{label} of {share:g}"

    def _scope(self, bar: Settings) -> Cells:
        return self.cells.on(bar["set"], measure=bar.get("measure"))

    def _label(self, bar: Settings) -> str:
        return f"{bar['set']} {LABELS[self._scope(bar).measure]}"


def table_of(verdicts: Sequence[Verdict]) -> Grid:
    """A row for each bar."""
    return Grid([Column(name, [getattr(item, name) for item in verdicts]) for name in Verdict._fields[:5]], names=5)


def claim_of(verdicts: Sequence[Verdict]) -> Grid:
    """A row for each bar, with what its best cell attends to and holds; one without results was not run.

    Which rows a bar is about is left to :func:`table_of`.
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


def _fits(bar: Settings, cell: Cell) -> bool:
    """Whether a cell holds no more of the cache than a bar allows, which may say nothing of it."""
    return (cell.cache or 0.0) <= float(bar.get("cache", 1.0)) + _HALF_A_PERCENT


def _chosen(best: Best) -> str:
    """What remains of the best of several, if it is chosen on other questions."""
    if best.ratio_apart is None:
        return ""
    return f"; best of {best.candidates}, {best.ratio_apart:.1%} if chosen on other questions"


def _kind(bar: Settings) -> str:
    """Which pairs a bar counts: those ``kept``, or all ``pairs``."""
    return "kept" if "kept" in bar else "pairs"


def _aim(bar: Settings) -> str:
    if (aim := bar.get("aim")) is None:
        return ""
    return f"{aim:.0%}" if "of" in bar else f"{aim:g}"


def _selects(rule: Settings | None) -> bool:
    """Whether tokens are kept by the lag-relative score; sinks and window alone are a control."""
    if not rule or rule.get("system"):
        return False
    return bool(rule["top_k"] and rule["compressor"]["class_path"].endswith(f".{LagRelative.__name__}"))


def _mean(cell: Cell, measure: str, seeds: int) -> str:
    """A cell's score, with its seeds where it has fewer than others of its row."""
    fewer = f" ({columns.seeds(len(cell.lines))})" if len(cell.lines) < seeds else ""
    return f"{cell.mean(measure):.3f}{fewer}"


def _judged(found: Estimate, required: float) -> str:
    """By the number; its interval says whether another sample might have told otherwise.

    Where all questions score the same the bootstrap knows no error, which is not to say that there is none.
    """
    if found.value >= required:
        return "met" if found.low >= required and found.high > found.low else "met, not beyond the error"
    return "**missed**" if found.high < required else "**missed**, within the error"


def _significant(found: Sequence[Comparison], p_values: Sequence[float], level: float, asked: int) -> str:
    above = [item.difference.value > 0 and p < level for item, p in zip(found, p_values, strict=True)]
    if not all(above):
        return "**missed**"
    if len(found) < asked:
        return "open"
    return "met" if all(item.difference.low > 0 for item in found) else "met, not beyond the error of seeds"


def _apart(pairs: Sequence[tuple[Cell, Cell]], measure: str) -> float | None:
    """Ratio of what is chosen on each half of the questions and measured on the other."""
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
