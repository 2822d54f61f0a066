"""Results as cells, rows under attentions over their seeds, and what the cells of a part are held against."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate, Groups, Scores
from lrsa_lit.study.plan import DENSE, OWN, Evaluation, Row, Study, digest_of
from lrsa_lit.study.results import Line, current

_SAME = ("backbone", "trainer", "data")
"""What dense training shares with a row that is held against it."""


@dataclass(frozen=True)
class Cell:
    """A row under one attention on one data set, over its seeds.

    Attributes:
        row: name of the row.
        attention: name of the attention.
        lines: its results, one for each seed, on the same questions.
    """

    row: str
    attention: str
    lines: tuple[Line, ...]

    @property
    def line(self) -> Line:
        """Any of them, for what they have in common."""
        return self.lines[0]

    @property
    def is_trained(self) -> bool:
        """Whether its seeds are of trainings; the base LLM has one."""
        return bool(self.line["train_digest"])

    def scores(self, name: str) -> Scores:
        """(R, Q) of ``f1``, ``em``, ``recall``, ``loss`` or ``tokens``."""
        return np.array([line[name] for line in self.lines], dtype=np.float64)

    def mean(self, measure: str) -> float:
        """Of all questions and seeds."""
        return float(self.scores(measure).mean())

    @property
    def groups(self) -> Groups | None:
        """(Q,) which questions share a context; None where the results do not say."""
        contexts = self.line.get("contexts")
        return np.array(contexts, dtype=np.int64) if contexts else None

    def of_seeds(self, other: Cell) -> Cell:
        """The cell with those seeds alone that another has as well, in their order."""
        seeds = {line["seed"] for line in other.lines}
        lines = sorted((line for line in self.lines if line["seed"] in seeds), key=lambda line: line["seed"])
        return Cell(self.row, self.attention, tuple(lines))

    @property
    def kept(self) -> float:
        """Share of pairs kept: K/L in a sparse layer, 1 in a dense one; windows and sinks come on top."""
        rule, layers = self.line["rule"], self.line["layers"]
        if rule is None:
            return 1.0
        dense = len(rule["dense_layers"])
        return float((dense + (layers - dense) * rule["top_k"] / rule["lag_size"]) / layers)

    @property
    def pairs(self) -> float:
        """Share of query-key pairs attended to, windows and sinks counted."""
        return float(self.line["kv_share"])

    def survival(self, evidence: str) -> float | None:
        """Share of the tokens of ``gold`` passages or ``answer`` spans that a head keeps, mean of the seeds."""
        shares = [line["survival"][evidence] for line in self.lines if line.get("survival")]
        known = [share for share in shares if share is not None]
        return float(np.mean(known)) if known else None

    @property
    def quarters(self) -> list[float] | None:
        """Shares that a head keeps of the quarters of a partition, means of the seeds; None where no result says."""
        shares = [line["survival"]["quarters"] for line in self.lines if (line.get("survival") or {}).get("quarters")]
        known = [row for row in shares if None not in row]
        return [float(share) for share in np.mean(known, axis=0)] if known else None


@dataclass(frozen=True)
class Entry:
    """What a table says of a cell.

    Attributes:
        cell: the cell.
        score: mean of the data set's measure.
        of_dense: against dense training with dense inference.
        of_same: against dense training under the same attention; None for dense training itself.
        of_named: against the row and attention that the part names.
    """

    cell: Cell
    score: Estimate
    of_dense: Comparison | None
    of_same: Comparison | None
    of_named: Comparison | None


class Cells:
    """All results as cells.

    Args:
        study: the study.
        lines: its results; those of weights that were trained anew since stay out.
    """

    def __init__(self, study: Study, lines: Sequence[Line]) -> None:
        self.study, self.lines = study, current(lines)
        self._found: dict[tuple[str, str, str], list[Line]] = {}
        for line in self.lines:
            if line["kind"] == "evaluation":
                self._found.setdefault((line["config"], line["set"], line["split"]), []).append(line)

    def cell(
        self,
        row: Row,
        attention: str,
        rule_digest: str,
        data_set: str,
        split: str,
        measure: str = "loss",
        seeds: Container[int] | None = None,
    ) -> Cell | None:
        """The cell of a row and rule on a data set, of those results that have the measure; of all seeds or of some."""
        lines = self._found.get((row.hash, data_set, split), [])
        if seeds is not None:
            lines = [line for line in lines if line["seed"] in seeds]
        found = [line for line in lines if line["rule_digest"] == rule_digest and line[measure]]
        # Answers to other questions, and after training on others, of a former version of the data, stay out.
        data = ("set_digest", "train_digest")
        same = [line for line in found if all(line[name] == found[-1][name] for name in data)]
        # A seed whose losses came first and whose answers later has two.
        by_seed = {line["seed"]: line for line in same}
        return Cell(row.name, attention, tuple(by_seed.values())) if by_seed else None

    def on(self, data_set: str, split: str, measure: str = "loss") -> list[Cell]:
        """All cells on a data set, row by row of the study, in the order of the results.

        Those of attentions that the study has no more stay out.
        """
        names = {digest_of(rule): name for name, rule in reversed(self.study.inference.items())}
        cells = []
        for row in self.study.rows.values():
            known = {digest_of(row.rule): OWN} | names
            lines = self._found.get((row.hash, data_set, split), [])
            for digest in dict.fromkeys(line["rule_digest"] for line in lines if line["rule_digest"] in known):
                cell = self.cell(row, known[digest], digest, data_set, split, measure)
                cells += [cell] if cell else []
        return cells


class Table:
    """The results of a part on one data set.

    All of it, what cells are held against as well, is of the part's seeds: other parts may have more of the same cells.

    Args:
        cells: all results.
        part: name of the part.
        data_set: name of the data set.

    Attributes:
        cells: those of the part that have results.
        measure: ``f1``, ``em``, ``recall`` or ``loss``.
        asked: how many results, seed by seed, the part asks for.
        done: how many of them there are.
    """

    def __init__(self, cells: Cells, part: str, data_set: str) -> None:
        study = cells.study
        self.study, self.part, self.data_set = study, part, data_set
        self.split = study.parts[part].get("split", "test")
        self.measure = measure_of(study, data_set, part)
        self.against: tuple[str, str] | None = None
        if (named := study.parts[part].get("against")) is not None:
            self.against = named["row"], named["inference"]
        self._all = cells
        self.cells: list[Cell] = []
        self.asked = self.done = 0
        items = self._items()
        trained = [seeds for (row, _), seeds in items.items() if study.row(row).steps]
        self._seeds = {seed for seeds in trained for seed in seeds} or {0}
        for (row, item), seeds in items.items():
            self.asked += len(seeds)
            cell = self._cell(study.row(row), item.name, item.rule_digest, seeds)
            if cell is not None:
                self.cells.append(cell)
                self.done += len(cell.lines)

    @cached_property
    def entries(self) -> list[Entry]:
        """One for each cell that has results, in the order of the part."""
        return [self._entry(cell) for cell in self.cells]

    def entry(self, row: str, attention: str) -> Entry | None:
        """The entry of a row under an attention of the part, by whichever name it stands there."""
        digest = self._digest(row, attention)
        found = (entry for entry in self.entries if entry.cell.row == row)
        return next((entry for entry in found if entry.cell.line["rule_digest"] == digest), None)

    @property
    def attentions(self) -> list[str]:
        """Those of the part, without the rows' own where each of them is another one as well."""
        names = list(dict.fromkeys(self.study.named(self.study.parts[self.part]["inference"])))
        others = {self._digest(cell.row, name) for cell in self.cells[:1] for name in names if name != OWN}
        own = {self._digest(cell.row, OWN) for cell in self.cells if OWN in names}
        return [name for name in names if name != OWN] if own <= others else names

    def _digest(self, row: str, attention: str) -> str:
        return digest_of(self.study.rule_of(self.study.row(row), attention))

    def _items(self) -> dict[tuple[str, Evaluation], set[int]]:
        """The evaluations of each row, all of one row together, and their seeds."""
        asked: dict[str, dict[Evaluation, set[int]]] = {}
        for work in self.study.work(self.part):
            for item in work.evaluations:
                if item.data_set == self.data_set:
                    asked.setdefault(work.row.name, {}).setdefault(item, set()).add(work.seed)
        return {(row, item): seeds for row, items in asked.items() for item, seeds in items.items()}

    def _cell(self, row: Row, attention: str, rule_digest: str, seeds: Container[int] | None = None) -> Cell | None:
        """A cell of the seeds that trained rows of the part have, or of others."""
        seeds = self._seeds if seeds is None else seeds
        return self._all.cell(row, attention, rule_digest, self.data_set, self.split, self.measure, seeds)

    def _entry(self, cell: Cell) -> Entry:
        score = score_of(cell, self.measure)
        if self.measure == "loss":
            return Entry(cell, score, None, None, None)
        row = reference_of(self.study, self.study.row(cell.row))
        dense = same = None
        if row is not None:
            dense = self._cell(row, "dense", DENSE)
            same = self._cell(row, cell.attention, cell.line["rule_digest"]) if row.name != cell.row else None
        return Entry(cell, score, *(compared(cell, other, self.measure) for other in (dense, same, self._named())))

    def _named(self) -> Cell | None:
        if self.against is None:
            return None
        row, attention = self.against
        return self._cell(self.study.row(row), attention, self._digest(row, attention))


def measure_of(study: Study, data_set: str, part: str | None = None) -> str:
    """What the tables of a data set show; the loss where no answers are generated."""
    return str(study.data_sets[data_set].get("measure", "f1")) if study.generates(data_set, part) else "loss"


def score_of(cell: Cell, measure: str) -> Estimate:
    """Mean of a measure over the questions; of the loss over their tokens."""
    if measure == "loss":
        return statistics.ratio_of_sums(cell.scores("loss"), cell.scores("tokens"), cell.groups)
    return statistics.mean(cell.scores(measure), cell.groups)


def compared(cell: Cell, other: Cell | None, measure: str) -> Comparison | None:
    """One cell against another, over the seeds that both have.

    None where there is none, it is the same, or it answered other questions or is of other seeds.
    """
    if other is None or other.lines == cell.lines or other.line["set_digest"] != cell.line["set_digest"]:
        return None
    pair = of_common_seeds(cell, other)
    if pair is None:
        return None
    one, two = (side.scores(measure) for side in pair)
    # Two attentions of the same weights: another seed on one side would be mistaken for the attention.
    return statistics.compare(one, two, cell.groups, same_seeds=cell.row == other.row)


def of_common_seeds(cell: Cell, other: Cell) -> tuple[Cell, Cell] | None:
    """Both with the seeds that both have, None where they have none; the base LLM is the same for each seed."""
    if not (cell.is_trained and other.is_trained):
        return cell, other
    pair = cell.of_seeds(other), other.of_seeds(cell)
    return pair if pair[0].lines else None


def reference_of(study: Study, row: Row) -> Row | None:
    """The dense training that a row is held against: the study's first one of as many steps on the same data.

    It has the learning rate that is best for it, which need not be the row's: each attention has its own, and dense
    training at a rate that was tuned for another one would be too easy to reach.
    """
    dense = [other for other in study.rows.values() if other.rule is None and other.steps]
    if row.steps == 0:
        return next(iter(dense), None)
    mine = row.trained_by()
    return next((other for other in dense if all(mine[name] == other.trained_by()[name] for name in _SAME)), None)
