"""Analysis of single questions: the position of the answer, scores by position, and the models' answers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.prompts import INSTRUCTION, Example
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation import statistics
from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.report import columns
from lrsa_lit.experiments.report.cells import Cell, Table
from lrsa_lit.experiments.report.columns import Column, Grid
from lrsa_lit.ops.sparse_attention import compressed_at, raw_start
from lrsa_lit.paths import nearest

# tqdm warns in notebooks without ipywidgets.
warnings.filterwarnings("ignore", message="IProgress not found")

ALWAYS = "visible to all heads"
LAST = "in the last K of a partition"
ELSEWHERE = "elsewhere"
NOWHERE = "not in the text"
PLACES = (ALWAYS, LAST, ELSEWHERE, NOWHERE)
"""Positions of an answer: in sinks or raw window; in a partition's last K tokens; in other tokens; not in the text."""

_TAIL = 400
"""Number of tokens at the end of a prompt that are searched for its question."""


def place_of(example: Example, rule: LRSAConfig) -> str:
    """The first place that contains a whole answer, as seen by the last token of the prompt."""
    spans = example["answer_spans"]
    for name, kept in ((ALWAYS, 0), (LAST, rule.top_k)):
        seen = _seen(example["prompt_length"], kept, rule)
        if any(seen[start:stop].all() for start, stop in spans):
            return name
    return ELSEWHERE if spans else NOWHERE


def by_place(table: Table, data: Path | None) -> Grid:
    """Scores of each cell of a part by the place of the answer, under the rule in the part's ``against``.

    The column titles give the numbers of questions, which are read from the study's data folder.

    Raises:
        UserError: ``against`` does not name a rule with a single K; a cell has a system, or other sinks, partitions or
            chunks; no folder is given, or it has other questions.
    """
    study, rule = table.study, None
    if table.against is not None:
        rule = study.rule_of(study.row(table.against[0]), table.against[1])
    if rule is None:
        raise UserError(f"parts.{table.part}.against", reason="it must name a rule, because places depend on a rule")
    for name, has in (("system", "a system, which has no partitions"), ("head_top_k", "a K for each head")):
        if getattr(rule, name) is not None:
            raise UserError(f"parts.{table.part}.against", reason=f"the rule that it names has {has}")
    _check_alike(table, rule)
    places = np.array([place_of(example, rule) for example in questions_of(table, data)])
    shown = columns.about(table.cells)
    for name in PLACES:
        member = places == name
        scores = [_score(cell, table.measure, member) for cell in table.cells]
        shown.append(Column(f"{name} ({member.sum()})", scores, columns.interval))
    return Grid(shown)


def questions_of(table: Table, data: Path | None) -> list[Example]:
    """The questions of a part's results; raises a UserError if the data folder has other questions or none."""
    if data is None:
        raise UserError("--data", reason="it is needed for the questions; name the folder of `lrsa study data`")
    questions = Questions(table.study, data)
    if questions.facts(table.data_set, table.split).digest != table.cells[0].line["set_digest"]:
        raise UserError(str(data), reason="its questions are not those of the results", hint="run `lrsa study data`")
    return list(questions.examples(table.data_set, table.split))


def answers(table: Table, number: int) -> pd.DataFrame:
    """The answers of each model and seed of a part to question ``number`` (from 0); raises a UserError without any."""
    asked = min((cell.line["questions"] for cell in table.cells), default=0)
    if table.measure == "loss" or not 0 <= number < asked:
        raise UserError("number", number, f"from 0 to {asked - 1}, the questions that {table.part} has answers to")
    rows = [(cell.row, cell.attention, line["seed"], line["text"][number], line[table.measure][number])
            for cell in table.cells for line in cell.lines]  # fmt: skip
    return pd.DataFrame(rows, columns=["trained", "inference", "seed", "answer", "score"])


def question(table: Table, number: int, data: str) -> dict[str, Any]:
    """Text and reference answers of a question, from the study's data folder ``data`` here or in a parent folder.

    Raises:
        UserError: there is no such folder, or its questions differ from those of the results.
    """
    example = questions_of(table, nearest(data))[number]
    from lrsa_lit.models import Backbone

    tokenizer = Backbone(**table.study.common["model"]["backbone"]).tokenizer
    text = str(tokenizer.decode(example["input_ids"][: example["prompt_length"]][-_TAIL:], skip_special_tokens=True))
    asked = text.rpartition(INSTRUCTION)[2].strip().partition("\n")[0]
    return {"question": asked.removeprefix("Question: "), "answers": list(example["answers"])}


def _seen(length: int, kept: int, rule: LRSAConfig) -> NDArray[np.bool_]:
    """Which tokens the last token sees if each compressed partition keeps its last ``kept`` tokens."""
    seen = np.ones(length, dtype=np.bool_)
    compressed = seen[rule.sink_size : raw_start(compressed_at(length - 1, rule.rule), rule.rule)]
    compressed.reshape(-1, rule.lag_size)[:, : rule.lag_size - kept] = False
    return seen


def _check_alike(table: Table, rule: LRSAConfig) -> None:
    """Check that all rules of a part have the same sinks, partitions and chunks; K may differ."""
    named = rule.to_dict()
    for cell in table.cells:
        own = cell.line["rule"]
        if own is not None and own.get("system"):
            system = own["system"]["class_path"].rpartition(".")[2]
            reason = f"{cell.row} under {cell.attention} has a system, {system}, whose places are not those of a rule"
            raise UserError(f"parts.{table.part}", reason=reason, hint="move it to a separate part")
        for key in ("sink_size", "lag_size", "chunk_size"):
            if own is not None and own[key] != named[key]:
                has = f"{cell.row} under {cell.attention} has {key} {own[key]}"
                needed = f"places need the {named[key]} of the rule in against"
                raise UserError(f"parts.{table.part}", reason=f"{has}; {needed}")


def _score(cell: Cell, measure: str, member: NDArray[np.bool_]) -> Estimate | None:
    if not member.any():
        return None
    groups = None if cell.groups is None else np.unique(cell.groups[member], return_inverse=True)[1]
    return statistics.mean(cell.scores(measure)[:, member], groups)
