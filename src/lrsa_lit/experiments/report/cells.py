"""Results as cells: a row under one attention on one data set, over its seeds."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Comparison, Estimate, Groups, Scores
from lrsa_lit.study.plan import OWN, Row, Study, digest_of
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

    def paired(self, other: Cell) -> tuple[Cell, Cell] | None:
        """Both with the seeds that both have; None if they have none. The base LLM, untrained, goes with any seed."""
        if not (self.line["train_digest"] and other.line["train_digest"]):
            return self, other
        common = {line["seed"] for line in self.lines} & {line["seed"] for line in other.lines}
        one, two = (
            sorted((line for line in cell.lines if line["seed"] in common), key=lambda line: line["seed"])
            for cell in (self, other)
        )
        return (replace(self, lines=tuple(one)), replace(other, lines=tuple(two))) if common else None

    def compared(self, other: Cell | None, measure: str) -> Comparison | None:
        """This cell against another one, over the seeds that both have.

        None where there is none, it is the same, or it answered other questions or is of other seeds.
        """
        if other is None or other.lines == self.lines or other.line["set_digest"] != self.line["set_digest"]:
            return None
        if (pair := self.paired(other)) is None:
            return None
        one, two = (side.scores(measure) for side in pair)
        # Two attentions of the same weights: another seed on one side would be mistaken for the attention.
        return statistics.compare(one, two, self.groups, same_seeds=self.row == other.row)


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
