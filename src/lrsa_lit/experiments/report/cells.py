"""Results as cells, rows under attentions over their seeds, and what the cells of a part are held against."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lrsa_lit.attention import LRSAConfig, cache_share, mean_top_k
from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate, Groups, Scores
from lrsa_lit.experiments.results import Line, current
from lrsa_lit.experiments.study import DENSE, OWN, Row, Study, digest_of
from lrsa_lit.systems.system import Head

_SAME = ("backbone", "trainer", "data")
"""What dense training shares with a row that is held against it."""


_ANY = Head(1, 1, 1)


@dataclass(frozen=True)
class Cell:
    """A row under one attention on one data set: its lines, one for each seed, on the same questions."""

    row: str
    attention: str
    lines: tuple[Line, ...]

    @property
    def line(self) -> Line:
        """Any of them, for what they have in common."""
        return self.lines[0]

    @property
    def key(self) -> tuple[str, str]:
        """The row and the digest of the rule, whatever the attention is called."""
        return self.row, self.line["rule_digest"]

    @property
    def groups(self) -> Groups | None:
        """(Q,) which questions share a context; None where the results do not say."""
        contexts = self.line.get("contexts")
        return np.array(contexts, dtype=np.int64) if contexts else None

    @property
    def kept(self) -> float:
        """Share of pairs kept: K/L in a sparse layer or head, 1 in a dense one; windows and sinks come on top.

        What a system keeps has been measured.
        """
        if measured := self.line.get("measured"):
            return float(measured["kept"])
        rule, layers = self.line["rule"], self.line["layers"]
        if rule is None:
            return 1.0
        return float(mean_top_k(rule, layers) / rule["lag_size"])

    @property
    def pairs(self) -> float:
        """Share of query-key pairs attended to, windows and sinks counted."""
        measured = self.line.get("measured")
        return float(measured["pairs"] if measured else self.line["kv_share"])

    @property
    def cache(self) -> float | None:
        """Bytes held at the end of the prompt, as a share of a dense cache's; of the rule where it was not measured.

        None where neither says.
        """
        if (measured := self.line.get("measured")) or self.line["rule"] is None:
            return float(measured["cache"]) if measured else 1.0
        rule = LRSAConfig.from_dict(self.line["rule"])
        # Old results name no model; the bytes of a pair are the same on both sides, unless more than pairs is held.
        further = rule.system or rule.latents or rule.compressor.has_bias or rule.compressor.window
        if further or not self.line.get("length"):
            return None
        return cache_share(rule, self.line["length"], self.line["layers"], _ANY)

    def scores(self, name: str) -> Scores:
        """(R, Q) of ``f1``, ``em``, ``recall``, ``loss`` or ``tokens``."""
        return np.array([line[name] for line in self.lines], dtype=np.float64)

    def mean(self, measure: str) -> float:
        """Of all questions and seeds."""
        return float(self.scores(measure).mean())

    def estimate(self, measure: str) -> Estimate:
        """Mean of a measure over the questions; of the loss over their tokens."""
        if measure == "loss":
            return statistics.ratio_of_sums(self.scores("loss"), self.scores("tokens"), self.groups)
        return statistics.mean(self.scores(measure), self.groups)

    def survival(self, name: str) -> Any:
        """What a head keeps, mean of the seeds that say it; None where none does.

        Args:
            name: ``gold`` passages or ``answer`` spans, a share of whose tokens is kept; or the ``quarters`` of a
                partition, each of which has a share.
        """
        found = [line["survival"].get(name) for line in self.lines if line.get("survival")]
        known = [kept for kept in found if kept is not None and not (isinstance(kept, list) and None in kept)]
        return np.mean(known, axis=0).tolist() if known else None

    def paired(self, other: Cell) -> tuple[Cell, Cell] | None:
        """Both with the seeds that both have; None if they have none, or answered other questions.

        The base LLM, untrained, goes with any seed.
        """
        if other.line["set_digest"] != self.line["set_digest"]:
            return None
        if not (self.line["train_digest"] and other.line["train_digest"]):
            return self, other
        seeds = sorted({line["seed"] for line in self.lines} & {line["seed"] for line in other.lines})
        return (self._of(seeds), other._of(seeds)) if seeds else None

    def _of(self, seeds: Sequence[int]) -> Cell:
        by_seed = {line["seed"]: line for line in self.lines}
        return replace(self, lines=tuple(by_seed[seed] for seed in seeds))

    def compared(self, other: Cell | None, measure: str) -> Comparison | None:
        """This cell against another one, :meth:`paired` with it; None where that cannot be, or it is the same."""
        if other is None or other.lines == self.lines or (pair := self.paired(other)) is None:
            return None
        one, two = (side.scores(measure) for side in pair)
        # Two attentions of the same weights: another seed on one side would be mistaken for the attention.
        return statistics.compare(one, two, self.groups, same_seeds=self.row == other.row)


class Cells:
    """Results of a study, all of them or those with a measure :meth:`on` one split.

    Those of weights that were trained anew since stay out.
    """

    def __init__(self, study: Study, lines: Sequence[Line], measure: str = "") -> None:
        self.study, self.lines, self.measure = study, current(lines), measure

    def on(self, data_set: str, split: str = "test", measure: str | None = None) -> Cells:
        """Those on a split of a data set that have a measure; the data set's where none is named."""
        measure = measure or measure_of(self.study, data_set)
        lines = [line for line in self.lines if line["kind"] == "evaluation"]
        on_it = [line for line in lines if (line["set"], line["split"]) == (data_set, split) and line[measure]]
        return Cells(self.study, on_it, measure)

    def cell(
        self, row: str, attention: str, digest: str | None = None, seeds: Container[int] | None = None
    ) -> Cell | None:
        """The cell of a row under an attention, or under the rule of a digest; of all seeds or of some."""
        trained = self.study.row(row)
        if digest is None:
            digest = digest_of(self.study.rule_of(trained, attention))
        key = trained.hash, digest
        lines = [line for line in self.lines if (line["config"], line["rule_digest"]) == key]
        found = [line for line in lines if seeds is None or line["seed"] in seeds]
        # Answers to other questions, and after training on others, of a former version of the data, stay out.
        data = ("set_digest", "train_digest")
        same = [line for line in found if all(line[name] == found[-1][name] for name in data)]
        # A seed whose losses came first and whose answers later has two.
        by_seed = {line["seed"]: line for line in same}
        return Cell(row, attention, tuple(by_seed.values())) if by_seed else None

    def cells(self) -> list[Cell]:
        """All cells of attentions that the study still has, row by row of the study, in the order of the results."""
        names = {digest_of(rule): name for name, rule in reversed(self.study.inference.items())}
        cells: list[Cell | None] = []
        for row in self.study.rows.values():
            known = {digest_of(row.rule): OWN} | names
            key = row.hash
            digests = dict.fromkeys(line["rule_digest"] for line in self.lines if line["config"] == key)
            cells += [self.cell(row.name, known[digest], digest) for digest in digests if digest in known]
        return [cell for cell in cells if cell is not None]


def measure_of(study: Study, data_set: str, part: str | None = None) -> str:
    """What the tables of a data set show; the loss where no answers are generated."""
    return str(study.data_sets[data_set].get("measure", "f1")) if study.generates(data_set, part) else "loss"


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


class Entry(NamedTuple):
    """A cell of a table, with its score, and that against those of others.

    Attributes:
        of_dense: against dense training with dense inference.
        of_same: against dense training under the same attention; None for dense training itself.
        of_named: against the row and attention that the part names.
    """

    cell: Cell
    score: Estimate
    of_dense: Comparison | None = None
    of_same: Comparison | None = None
    of_named: Comparison | None = None


class Table:
    """The results of a part on one data set: cells, ``done`` of the results that are ``asked`` for, seed by seed.

    All of it, what cells are held against as well, is of the part's seeds: other parts may have more of the same cells.
    """

    def __init__(self, cells: Cells, part: str, data_set: str) -> None:
        self.study, self.part, self.data_set = cells.study, part, data_set
        asked = self.study.parts[part]
        self.split = asked.get("split", "test")
        self.measure = measure_of(self.study, data_set, part)
        named = asked.get("against")
        self.against: tuple[str, str] | None = (named["row"], named["inference"]) if named else None
        self._on_it = cells.on(data_set, self.split, self.measure)
        rows = [self.study.row(name) for name in dict.fromkeys(asked["rows"])]
        seeds = set(asked.get("seeds") or self.study.seeds)
        # Of trained rows: what else is held against them is of these seeds too.
        self._seeds = seeds if any(row.steps for row in rows) else {0}
        items = [(row, item, seeds if row.steps else {0}) for row in rows
                 for item in self.study.evaluations(part, row) if item.data_set == data_set]  # fmt: skip
        found = [self._on_it.cell(row.name, item.name, item.rule_digest, of) for row, item, of in items]
        self.cells = [cell for cell in found if cell is not None]
        self.asked = sum(len(of) for _, _, of in items)
        self.done = sum(len(cell.lines) for cell in self.cells)

    @cached_property
    def entries(self) -> list[Entry]:
        """One for each cell that has results, in the order of the part."""
        return [self._entry(cell) for cell in self.cells]

    def entry(self, row: str, attention: str) -> Entry | None:
        """The entry of a row under an attention of the part, by whichever name it stands there."""
        key = row, self._digest(row, attention)
        return next((entry for entry in self.entries if entry.cell.key == key), None)

    @property
    def attentions(self) -> list[str]:
        """Those of the part, without the rows' own where each of them is another one as well."""
        names = list(dict.fromkeys(self.study.named(self.study.parts[self.part]["inference"])))
        others = {self._digest(cell.row, name) for cell in self.cells[:1] for name in names if name != OWN}
        own = {self._digest(cell.row, OWN) for cell in self.cells if OWN in names}
        return [name for name in names if name != OWN] if own <= others else names

    def _digest(self, row: str, attention: str) -> str:
        return digest_of(self.study.rule_of(self.study.row(row), attention))

    def _entry(self, cell: Cell) -> Entry:
        score = cell.estimate(self.measure)
        if self.measure == "loss":
            return Entry(cell, score)
        dense = reference_of(self.study, self.study.row(cell.row))
        asked = [
            (dense.name, "dense", DENSE) if dense else None,
            (dense.name, cell.attention, cell.key[1]) if dense and dense.name != cell.row else None,
            (*self.against, self._digest(*self.against)) if self.against else None,
        ]
        others = [names and self._on_it.cell(*names, self._seeds) for names in asked]
        return Entry(cell, score, *(cell.compared(other, self.measure) for other in others))
