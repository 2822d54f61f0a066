"""Where the answer to a question stands in its context, and how often each attention answers it from there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.report import markdown
from lrsa_lit.experiments.report.tables import Cell, Table
from lrsa_lit.ops.sparse_attention import LRSAConfig
from lrsa_lit.ops.sparse_attention.geometry import compressed_at, raw_start
from lrsa_lit.study import tokens
from lrsa_lit.study.tokens import TokenFile

ALWAYS = "seen by all"
LAST = "in a partition's last K"
ELSEWHERE = "elsewhere"
NOWHERE = "not in the text"
PLACES = (ALWAYS, LAST, ELSEWHERE, NOWHERE)
"""Of an answer: among the sinks and the raw window; whole among the K tokens of a partition that recency keeps; in
other compressed tokens; or in no words of the supporting passages, as yes and no."""


class Place(NamedTuple):
    """The questions of one place, and what a cell scores on them.

    Attributes:
        name: one of :data:`PLACES`.
        questions: how many.
        score: None where there are none.
    """

    name: str
    questions: int
    score: Estimate | None

    @property
    def label(self) -> str:
        """The name, and of how many questions."""
        return f"{self.name} ({self.questions})"


def place_of(example: Example, rule: LRSAConfig) -> str:
    """The first place that has the answer whole, when the last token of the prompt attends."""
    spans = example["answer_spans"]
    for name, kept in ((ALWAYS, 0), (LAST, rule.top_k)):
        seen = _seen(example["prompt_length"], kept, rule)
        if any(seen[start:stop].all() for start, stop in spans):
            return name
    return ELSEWHERE if spans else NOWHERE


def _seen(length: int, kept: int, rule: LRSAConfig) -> NDArray[np.bool_]:
    """Which of the tokens the last one sees where each compressed partition keeps its last ``kept``."""
    seen = np.ones(length, dtype=np.bool_)
    compressed = seen[rule.sink_size : raw_start(compressed_at(length - 1, rule), rule)]
    compressed.reshape(-1, rule.lag_size)[:, : rule.lag_size - kept] = False
    return seen


def by_place(table: Table, data: Path | None) -> list[tuple[Cell, list[Place]]]:
    """For each cell of a part its score by the place of the answer, under the rule that the part holds others against.

    Args:
        table: the part on a data set.
        data: folder of the study's token files.

    Raises:
        UserError: the part names no rule or has one of other sinks, partitions or chunks, no folder is given, or it has
            other questions.
    """
    rule = None
    if table.against is not None:
        row, attention = table.against
        rule = table.study.rule_of(table.study.row(row), attention)
    if rule is None:
        raise UserError(f"parts.{table.part}.against: it must name a rule, for places are those of a rule")
    _check_alike(table, rule)
    file = questions_of(table, data)
    places = np.array([place_of(example, rule) for example in file.examples])
    return [(cell, [_scored(cell, table.measure, name, places == name) for name in PLACES]) for cell in table.cells]


def questions_of(table: Table, data: Path | None) -> TokenFile:
    """The questions that the results of a part are about.

    Raises:
        UserError: there is no folder, no such file, or its questions are others.
    """
    if data is None:
        raise UserError("it needs the questions: --data, the folder that `lrsa study data` has written")
    path = tokens.path_of(data, table.data_set, table.split)
    file = tokens.read(path)
    if file.digest != table.cells[0].line["set_digest"]:
        raise UserError(f"{path}: these are other questions than those of the results; write them anew")
    return file


def table_of(found: Sequence[tuple[Cell, Sequence[Place]]]) -> list[str]:
    """A row for each cell and a column for each place."""
    head = [place.label for place in found[0][1]]
    body = [
        [cell.row, cell.attention, str(len(cell.lines)), *(_shown(place.score) for place in places)]
        for cell, places in found
    ]
    return markdown.rows_of(["trained", "inference", "seeds", *head], body)


def _check_alike(table: Table, rule: LRSAConfig) -> None:
    """The tokens that all see must be the same under every rule; how many others are kept may differ."""
    named = rule.to_dict()
    for cell in table.cells:
        own = cell.line["rule"]
        for key in ("sink_size", "lag_size", "chunk_size"):
            if own is not None and own[key] != named[key]:
                raise UserError(
                    f"parts.{table.part}: {cell.row} under {cell.attention} has {key} {own[key]}; places need the "
                    f"{named[key]} of the rule in against"
                )


def _scored(cell: Cell, measure: str, name: str, member: NDArray[np.bool_]) -> Place:
    count = int(member.sum())
    if not count:
        return Place(name, 0, None)
    groups = None if cell.groups is None else np.unique(cell.groups[member], return_inverse=True)[1]
    return Place(name, count, statistics.mean(cell.scores(measure)[:, member], groups))


def _shown(score: Estimate | None) -> str:
    return "" if score is None else markdown.interval(score, 3)
