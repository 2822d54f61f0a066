"""What a study must reach, as its ``bars`` say, and what it has reached.

A bar asks for one of three things on a data set's test split:

- ``kept`` (or ``pairs``) and ``of_dense``: that the best LRSA-trained row under LRSA that keeps (or attends to) no more
  than this share of the pairs reaches so much of the score of dense training with dense inference, and, where they are
  given, only of the dense rows in ``reference`` with the scores of ``reference_at_least``, since a share of a weak
  model is easily reached; rows with fewer seeds than the study's do not count where others have them;
- ``row``, ``inference`` and ``at_least``: a score of one cell, or of the best of several rows;
- ``row``, ``inference``, ``above`` and ``p``: a score above those of other cells, each ``[row, inference]``, by paired
  tests adjusted by Holm's method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrsa_lit.errors import UserError
from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate
from lrsa_lit.experiments.report import markdown
from lrsa_lit.experiments.report.tables import (
    Cell,
    Cells,
    compared,
    measure_of,
    of_common_seeds,
    reference_of,
    score_of,
)
from lrsa_lit.ops.sparse_attention import LagRelative, LRSAConfig
from lrsa_lit.study.checks import MEASURES
from lrsa_lit.study.plan import DENSE, Study, digest_of
from lrsa_lit.study.settings import Settings

_SHARES = ("kept", "pairs")
_REFERENCE = {"reference", "reference_at_least"}
_FORMS = (
    ({"set", "measure", "kept", "of_dense", *_REFERENCE}, {"set", "kept", "of_dense"}),
    ({"set", "measure", "pairs", "of_dense", *_REFERENCE}, {"set", "pairs", "of_dense"}),
    ({"set", "measure", "row", "inference", "at_least"}, {"set", "row", "inference", "at_least"}),
    ({"set", "measure", "row", "inference", "above", "p"}, {"set", "row", "inference", "above", "p"}),
)
"""What a bar of each kind may have, and must have."""

_HALF_A_PERCENT = 0.005
"""Shares are held against a bar's as whole percents, as the tables show them."""


@dataclass(frozen=True)
class Best:
    """The best cell of those that a bar allows.

    Attributes:
        cell: the cell.
        reference: dense training with dense inference of the same row's training.
        same: dense training under the cell's attention, of the reference's seeds, if there are results.
        ratio: of the cell's score by the reference's.
        candidates: how many cells it is the best of.
        ratio_apart: the same when the cell is chosen on one half of the questions and measured on the other; None for
            a single candidate.
    """

    cell: Cell
    reference: Cell
    same: Cell | None
    ratio: Estimate
    candidates: int
    ratio_apart: float | None


@dataclass(frozen=True)
class Verdict:
    """A bar and what was reached.

    Attributes:
        name: of the bar.
        required: what it asks for.
        reached: what the results say; empty where there are none.
        by: which cells reached it.
        verdict: ``met``, ``missed`` or ``open``, and whether the interval leaves it undecided.
    """

    name: str
    required: str
    reached: str
    by: str
    verdict: str


class Bars:
    """The bars of a study.

    Args:
        cells: all results.

    Raises:
        UserError: a bar has keys that do not fit together, or names what the study does not have.
    """

    def __init__(self, cells: Cells) -> None:
        self.cells, self.study = cells, cells.study
        for name, bar in self.study.bars.items():
            _check(self.study, name, bar)

    def verdicts(self) -> list[Verdict]:
        """One for each bar."""
        return [self._verdict(name, bar) for name, bar in self.study.bars.items()]

    def measure(self, bar: Settings) -> str:
        """What a bar is about."""
        return str(bar.get("measure") or measure_of(self.study, bar["set"]))

    def best(self, bar: Settings) -> Best | None:
        """The cell with the largest share of dense training's score among those that the bar allows.

        Of these only the ones of as many seeds as the study has, or else of the most: of one seed the best is the
        luckiest.
        """
        kind, measure = next(name for name in _SHARES if name in bar), self.measure(bar)
        pairs: list[tuple[Cell, Cell]] = []
        for cell in self.cells.on(bar["set"], "test", measure):
            row = self.study.row(cell.row)
            ruled = row.rule is not None and _selects(row.rule) and _lag_relative(cell)
            if ruled and row.steps and getattr(cell, kind) <= bar[kind] + _HALF_A_PERCENT:
                pairs += [pair] if (pair := self._with_reference(bar, cell)) else []
        enough = min(len(self.study.seeds), max((len(cell.lines) for cell, _ in pairs), default=0))
        pairs = [pair for pair in pairs if len(pair[0].lines) >= enough]
        if not pairs:
            return None
        cell, reference = max(pairs, key=lambda pair: pair[0].mean(measure) / pair[1].mean(measure))
        found = compared(cell, reference, measure)
        assert found is not None  # they are of other weights, and of the same questions and seeds
        dense = self.study.row(reference.row)
        seeds = {line["seed"] for line in reference.lines}
        same = self.cells.cell(dense, cell.attention, cell.line["rule_digest"], bar["set"], "test", measure, seeds)
        return Best(cell, reference, same, found.ratio, len(pairs), _apart(pairs, measure))

    def _with_reference(self, bar: Settings, cell: Cell) -> tuple[Cell, Cell] | None:
        """A cell and dense training with dense inference that it is held against, if the bar allows that one."""
        dense, measure = reference_of(self.study, self.study.row(cell.row)), self.measure(bar)
        if dense is None or dense.name not in bar.get("reference", [dense.name]):
            return None
        reference = self.cells.cell(dense, DENSE, DENSE, bar["set"], "test", measure)
        if reference is None or reference.line["set_digest"] != cell.line["set_digest"]:
            return None
        pair = of_common_seeds(cell, reference)
        if pair is None or not pair[1].mean(measure):
            return None
        asked = bar.get("reference_at_least", {})
        return pair if all(pair[1].mean(name) >= least for name, least in asked.items()) else None

    def _verdict(self, name: str, bar: Settings) -> Verdict:
        if "of_dense" in bar:
            return self._of_dense(name, bar)
        return self._score(name, bar) if "at_least" in bar else self._above(name, bar)

    def _of_dense(self, name: str, bar: Settings) -> Verdict:
        kind = next(share for share in _SHARES if share in bar)
        required = f"{bar['of_dense']:.0%} of dense {self._label(bar)}, {bar[kind]:.3g} {kind}"
        asked = bar.get("reference_at_least", {}).items()
        required += "".join(f", dense {markdown.LABELS[name]} at least {least:g}" for name, least in asked)
        best = self.best(bar)
        if best is None:
            return Verdict(name, required, "", "", "open")
        cell = best.cell
        shares = f"kept {cell.kept:.1%}, pairs {cell.pairs:.1%}"
        seeds = markdown.seeds(len(cell.lines))
        by = f"{cell.row} under {cell.attention} ({shares}), against {best.reference.row}, {seeds}"
        if best.ratio_apart is not None:
            by += f"; best of {best.candidates}, {best.ratio_apart:.1%} if chosen on other questions"
        return Verdict(name, required, markdown.percent(best.ratio), by, _judged(best.ratio, bar["of_dense"]))

    def _score(self, name: str, bar: Settings) -> Verdict:
        required, measure = f"{self._label(bar)} at least {bar['at_least']:g}", self.measure(bar)
        rows = [bar["row"]] if isinstance(bar["row"], str) else bar["row"]
        found = [cell for row in rows if (cell := self._cell(bar, row, bar["inference"])) is not None]
        if not found:
            return Verdict(name, required, "", "", "open")
        cell = max(found, key=lambda cell: cell.mean(measure))
        score = score_of(cell, measure)
        by = f"{cell.row} under {cell.attention}, {markdown.seeds(len(cell.lines))}"
        by += f"; best of {len(found)}" if len(found) > 1 else ""
        return Verdict(name, required, markdown.interval(score, 3), by, _judged(score, bar["at_least"]))

    def _above(self, name: str, bar: Settings) -> Verdict:
        measure, asked = self.measure(bar), bar["above"]
        required = f"{self._label(bar)} above {_listed(asked)}, p < {bar['p']:g}"
        cell = self._cell(bar, bar["row"], bar["inference"])
        others = [other for row, attention in asked if (other := self._cell(bar, row, attention)) is not None]
        pairs = [pair for other in others if cell and (pair := of_common_seeds(cell, other))]
        found = [(len(pair[0].lines), item) for pair in pairs if (item := compared(*pair, measure)) is not None]
        known = [item for _, item in found]
        if not known:
            return Verdict(name, required, "", "", "open")
        p_values = statistics.holm([item.p_value for item in known])
        worst = min(range(len(known)), key=lambda number: known[number].difference.value)
        reached = f"{markdown.interval(known[worst].difference, 3, '+')}, p = {max(p_values):.4f}"
        measured = f" ({len(known)} of {len(asked)} measured)" if len(known) < len(asked) else ""
        seeds = markdown.seeds(min(count for count, _ in found))
        by = f"{bar['row']} under {bar['inference']}, {seeds}; the smallest difference and the largest p{measured}"
        return Verdict(name, required, reached, by, _significant(known, p_values, bar["p"], len(asked)))

    def _cell(self, bar: Settings, row: str, attention: str) -> Cell | None:
        found = self.study.row(row)
        digest = digest_of(self.study.rule_of(found, attention))
        return self.cells.cell(found, attention, digest, bar["set"], "test", self.measure(bar))

    def _label(self, bar: Settings) -> str:
        return f"{bar['set']} {markdown.LABELS[self.measure(bar)]}"


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


def _selects(rule: LRSAConfig) -> bool:
    """Whether tokens are kept by the lag-relative score; sinks and window alone are a control."""
    return isinstance(rule.compressor, LagRelative) and rule.top_k > 0


def _lag_relative(cell: Cell) -> bool:
    rule = cell.line["rule"]
    layers = cell.line["layers"]
    own = rule is not None and rule["compressor"]["class_path"].endswith(f".{LagRelative.__name__}")
    return bool(own and rule["top_k"] > 0 and len(rule["dense_layers"]) < layers)


def _listed(cells: Sequence[Sequence[str]]) -> str:
    return ", ".join(f"{row} under {attention}" for row, attention in cells)


def _check(study: Study, name: str, bar: Any) -> None:
    where = f"{study.name}: bars.{name}"
    keys = set(bar) if isinstance(bar, dict) else set()
    if not any(must <= keys <= may for may, must in _FORMS):
        allowed = "; or ".join(", ".join(sorted(must)) for _, must in _FORMS)
        raise UserError(
            f"{where}: the keys {', '.join(map(str, keys)) or 'none'} are not allowed; they must be {allowed}"
        )
    if not isinstance(bar["set"], str) or bar["set"] not in study.data_sets:
        raise UserError(f"{where}.set: there is no data set {bar['set']!r} in data_sets")
    measure = bar.get("measure") or measure_of(study, bar["set"])
    if measure not in MEASURES:
        raise UserError(f"{where}.measure: {measure!r} is not allowed; it must be {', '.join(MEASURES)}")
    for key in ("kept", "pairs", "of_dense", "at_least", "p"):
        if not isinstance(bar.get(key, 0), int | float):
            raise UserError(f"{where}.{key}: {bar[key]!r} is not allowed; it must be a number")
    _check_reference(study, where, bar)
    above = bar.get("above", [])
    if not isinstance(above, list) or any(not _is_names(other) or len(other) != 2 for other in above):
        raise UserError(f"{where}.above: {above} is not allowed; it must be a list of [row, inference]")
    rows = [bar["row"]] if isinstance(bar.get("row"), str) else bar.get("row", [])
    if not _is_names([*rows, bar.get("inference", "")] if isinstance(rows, list) else rows):
        raise UserError(f"{where}: row and inference must be names; {rows!r} and {bar['inference']!r} are not allowed")
    for row, attention in [*((row, bar["inference"]) for row in rows), *above]:
        study.rule_of(study.row(row), attention, where)


def _is_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) for name in given)


def _check_reference(study: Study, where: str, bar: Settings) -> None:
    rows, least = bar.get("reference", []), bar.get("reference_at_least", {})
    if not _is_names(rows):
        raise UserError(f"{where}.reference: {rows!r} is not allowed; it must be a list of rows")
    for row in rows:
        study.row(row)
    if not isinstance(least, dict) or not all(isinstance(value, int | float) for value in least.values()):
        raise UserError(
            f"{where}.reference_at_least: {least!r} is not allowed; it must be measures, each with a number"
        )
    if unknown := [measure for measure in least if measure not in MEASURES]:
        allowed = ", ".join(MEASURES)
        raise UserError(f"{where}.reference_at_least: {unknown[0]!r} is not allowed; it must be {allowed}")
