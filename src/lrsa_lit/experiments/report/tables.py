"""A part of a study on one data set: its cells, and what they are held against."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property

from lrsa_lit.evaluation.statistics import Comparison, Estimate
from lrsa_lit.experiments.report.cells import Cell, Cells, measure_of, reference_of
from lrsa_lit.study.plan import DENSE, OWN, Evaluation, digest_of


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
        self.study, self.part, self.data_set = cells.study, part, data_set
        asked = self.study.parts[part]
        self.split = asked.get("split", "test")
        self.measure = measure_of(self.study, data_set, part)
        named = asked.get("against")
        self.against: tuple[str, str] | None = (named["row"], named["inference"]) if named else None
        self._all = cells
        items = self._items()
        self._seeds = {seed for (row, _), seeds in items.items() if self.study.row(row).steps for seed in seeds} or {0}
        found = [self._cell(row, item.name, item.rule_digest, seeds) for (row, item), seeds in items.items()]
        self.cells = [cell for cell in found if cell is not None]
        self.asked = sum(map(len, items.values()))
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

    def _items(self) -> dict[tuple[str, Evaluation], set[int]]:
        """The evaluations of each row, all of one row together, and their seeds."""
        rows = self.study.parts[self.part]["rows"]
        found: dict[tuple[str, Evaluation], set[int]] = {}
        for work in sorted(self.study.work(self.part), key=lambda work: rows.index(work.row.name)):
            for item in work.evaluations:
                if item.data_set == self.data_set:
                    found.setdefault((work.row.name, item), set()).add(work.seed)
        return found

    def _cell(self, row: str, attention: str, rule_digest: str, seeds: Container[int] | None = None) -> Cell | None:
        """A cell of the seeds that trained rows of the part have, or of others."""
        seeds = self._seeds if seeds is None else seeds
        found = self.study.row(row)
        return self._all.cell(found, attention, rule_digest, self.data_set, self.split, self.measure, seeds)

    def _entry(self, cell: Cell) -> Entry:
        score = cell.estimate(self.measure)
        if self.measure == "loss":
            return Entry(cell, score, None, None, None)
        dense = reference_of(self.study, self.study.row(cell.row))
        others = [
            self._cell(dense.name, "dense", DENSE) if dense else None,
            self._cell(dense.name, cell.attention, cell.key[1]) if dense and dense.name != cell.row else None,
            self._cell(*self.against, self._digest(*self.against)) if self.against else None,
        ]
        return Entry(cell, score, *(cell.compared(other, self.measure) for other in others))
