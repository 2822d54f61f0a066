"""Results as cells (a row under an attention, with all seeds), and the comparisons of a part's cells."""

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
"""What dense training must share with a row that is compared with it."""


_ANY = Head(1, 1, 1)


@dataclass(frozen=True)
class Cell:
    """The results of a row under one attention on one data set: one line per seed, for the same questions."""

    row: str
    attention: str
    lines: tuple[Line, ...]

    @property
    def line(self) -> Line:
        """One of the lines, for fields that are equal in all."""
        return self.lines[0]

    @property
    def key(self) -> tuple[str, str]:
        """The row and the digest of the rule, independent of the attention's name."""
        return self.row, self.line["rule_digest"]

    @property
    def groups(self) -> Groups | None:
        """(Q,) the context of each question, as a number; None if the results do not have it."""
        contexts = self.line.get("contexts")
        return np.array(contexts, dtype=np.int64) if contexts else None

    @property
    def kept(self) -> float:
        """Share of pairs kept: K/L in a sparse layer or head, 1 in a dense one; without windows and sinks.

        For systems, the share is measured.
        """
        if measured := self.line.get("measured"):
            return float(measured["kept"])
        rule, layers = self.line["rule"], self.line["layers"]
        if rule is None:
            return 1.0
        return float(mean_top_k(rule, layers) / rule["lag_size"])

    @property
    def pairs(self) -> float:
        """Share of query-key pairs attended to, including windows and sinks."""
        measured = self.line.get("measured")
        return float(measured["pairs"] if measured else self.line["kv_share"])

    @property
    def cache(self) -> float | None:
        """Bytes held at the end of the prompt, as a share of a dense cache: measured, or else computed from the rule.

        None if the results allow neither.
        """
        if (measured := self.line.get("measured")) or self.line["rule"] is None:
            return float(measured["cache"]) if measured else 1.0
        rule = LRSAConfig.from_dict(self.line["rule"])
        # Old results do not name the model. If only pairs are held, the bytes per pair cancel out.
        further = rule.system or rule.latents or rule.compressor.has_bias or rule.compressor.window
        if further or not self.line.get("length"):
            return None
        return cache_share(rule, self.line["length"], self.line["layers"], _ANY)

    def scores(self, name: str) -> Scores:
        """(R, Q) values of ``f1``, ``em``, ``recall``, ``loss`` or ``tokens``, for R seeds and Q questions."""
        return np.array([line[name] for line in self.lines], dtype=np.float64)

    def mean(self, measure: str) -> float:
        """Mean over all questions and seeds."""
        return float(self.scores(measure).mean())

    def estimate(self, measure: str) -> Estimate:
        """Mean of a measure over the questions; for the loss, over their tokens."""
        if measure == "loss":
            return statistics.ratio_of_sums(self.scores("loss"), self.scores("tokens"), self.groups)
        return statistics.mean(self.scores(measure), self.groups)

    def survival(self, name: str) -> Any:
        """Share of tokens that a head keeps, averaged over the seeds that recorded it; None if none did.

        Args:
            name: ``gold`` (supporting passages), ``answer`` (answer spans), or ``quarters`` (a list with the share of
                each quarter of a partition).
        """
        found = [line["survival"].get(name) for line in self.lines if line.get("survival")]
        known = [kept for kept in found if kept is not None and not (isinstance(kept, list) and None in kept)]
        return np.mean(known, axis=0).tolist() if known else None

    def paired(self, other: Cell) -> tuple[Cell, Cell] | None:
        """Both cells restricted to their common seeds; None if there are none, or the questions differ.

        The untrained base LLM matches any seed.
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
        """Compare this cell with another one, :meth:`paired`; None if they cannot be paired or are the same."""
        if other is None or other.lines == self.lines or (pair := self.paired(other)) is None:
            return None
        one, two = (side.scores(measure) for side in pair)
        # Both sides have the same weights, so seeds must match, or a seed's effect would pass for the attention's.
        return statistics.compare(one, two, self.groups, same_seeds=self.row == other.row)


class Cells:
    """Results of a study: all of them, or those with a measure :meth:`on` one split.

    Results of weights that have been trained again since are left out.
    """

    def __init__(self, study: Study, lines: Sequence[Line], measure: str = "") -> None:
        self.study, self.lines, self.measure = study, current(lines), measure

    def on(self, data_set: str, split: str = "test", measure: str | None = None) -> Cells:
        """The results on a split of a data set that have a measure; by default the data set's measure."""
        measure = measure or measure_of(self.study, data_set)
        lines = [line for line in self.lines if line["kind"] == "evaluation"]
        on_it = [line for line in lines if (line["set"], line["split"]) == (data_set, split) and line[measure]]
        return Cells(self.study, on_it, measure)

    def cell(
        self, row: str, attention: str, digest: str | None = None, seeds: Container[int] | None = None
    ) -> Cell | None:
        """The cell of a row under an attention, or under the rule with a digest; with all or selected seeds."""
        trained = self.study.row(row)
        if digest is None:
            digest = digest_of(self.study.rule_of(trained, attention))
        key = trained.hash, digest
        lines = [line for line in self.lines if (line["config"], line["rule_digest"]) == key]
        found = [line for line in lines if seeds is None or line["seed"] in seeds]
        # Leave out results of an earlier version of the data, for training or evaluation.
        data = ("set_digest", "train_digest")
        same = [line for line in found if all(line[name] == found[-1][name] for name in data)]
        # A seed has two lines if its losses were computed first and its answers later.
        by_seed = {line["seed"]: line for line in same}
        return Cell(row, attention, tuple(by_seed.values())) if by_seed else None

    def cells(self) -> list[Cell]:
        """All cells of attentions that the study still has: by row of the study, then in the order of the results."""
        names = {digest_of(rule): name for name, rule in reversed(self.study.inference.items())}
        cells: list[Cell | None] = []
        for row in self.study.rows.values():
            known = {digest_of(row.rule): OWN} | names
            key = row.hash
            digests = dict.fromkeys(line["rule_digest"] for line in self.lines if line["config"] == key)
            cells += [self.cell(row.name, known[digest], digest) for digest in digests if digest in known]
        return [cell for cell in cells if cell is not None]


def measure_of(study: Study, data_set: str, part: str | None = None) -> str:
    """The measure in the tables of a data set; the loss if no answers are generated."""
    return str(study.data_sets[data_set].get("measure", "f1")) if study.generates(data_set, part) else "loss"


def reference_of(study: Study, row: Row) -> Row | None:
    """The dense training that a row is compared with: the study's first one with as many steps on the same data.

    Its learning rate may differ from the row's: each attention has its own best rate, and dense training at a rate that
    was tuned for another attention would be a weak baseline.
    """
    dense = [other for other in study.rows.values() if other.rule is None and other.steps]
    if row.steps == 0:
        return next(iter(dense), None)
    mine = row.trained_by()
    return next((other for other in dense if all(mine[name] == other.trained_by()[name] for name in _SAME)), None)


class Entry(NamedTuple):
    """A cell of a table, with its score and comparisons.

    Attributes:
        cell: the cell.
        score: the estimate of the table's measure.
        of_dense: comparison with dense training with dense inference.
        of_same: comparison with dense training under the same attention; None for dense training itself.
        of_named: comparison with the row and attention in the part's ``against``.
    """

    cell: Cell
    score: Estimate
    of_dense: Comparison | None = None
    of_same: Comparison | None = None
    of_named: Comparison | None = None


class Table:
    """The results of a part on one data set; ``done`` of the ``asked`` results exist, counted per seed.

    Cells, and the cells that they are compared with, have only the part's seeds; other parts may have more.
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
        # Cells that trained rows are compared with have the same seeds.
        self._seeds = seeds if any(row.steps for row in rows) else {0}
        items = [(row, item, seeds if row.steps else {0}) for row in rows
                 for item in self.study.evaluations(part, row) if item.data_set == data_set]  # fmt: skip
        found = [self._on_it.cell(row.name, item.name, item.rule_digest, of) for row, item, of in items]
        self.cells = [cell for cell in found if cell is not None]
        self.asked = sum(len(of) for _, _, of in items)
        self.done = sum(len(cell.lines) for cell in self.cells)

    @cached_property
    def entries(self) -> list[Entry]:
        """One entry per cell with results, in the order of the part."""
        return [self._entry(cell) for cell in self.cells]

    def entry(self, row: str, attention: str) -> Entry | None:
        """The entry of a row under an attention of the part, by any of the attention's names."""
        key = row, self._digest(row, attention)
        return next((entry for entry in self.entries if entry.cell.key == key), None)

    @property
    def attentions(self) -> list[str]:
        """The attentions of the part; "own" is left out if each row's own attention is also listed by name."""
        names = self.study.named(self.study.parts[self.part]["inference"])
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
