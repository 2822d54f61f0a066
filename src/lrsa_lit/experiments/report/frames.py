"""A study's results for notebooks: tables of pandas, and the answers to single questions."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import evidence, places
from lrsa_lit.experiments.report.bars import Bars
from lrsa_lit.experiments.report.document import results_of
from lrsa_lit.experiments.report.tables import Cells, Table
from lrsa_lit.study.plan import Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 400
"""Tokens at the end of a prompt in which its question is looked for."""


def load(results: str, study: str) -> Cells:
    """The results of a study.

    Args:
        results: their file, in this folder or one above.
        study: the study's file, in this folder or one above, or as it ships.

    Raises:
        UserError: there are no results, or no such study.
    """
    found = Study(str(nearest(study)))
    return Cells(found, results_of(found, nearest(results)))


def nearest(name: str) -> Path:
    """A path as it is in this folder, else in the nearest one above that has it; the path itself where none does."""
    return next((folder / name for folder in (Path.cwd(), *Path.cwd().parents) if (folder / name).exists()), Path(name))


def entries(table: Table) -> pd.DataFrame:
    """A row for each cell of a part: its score with its interval, and what dense training reaches.

    Columns: ``trained``, ``inference``, ``seeds``, ``kept``, ``pairs``, ``score``, ``low``, ``high``, ``of_dense`` (by
    the score of dense training with dense inference), ``gain`` (over dense training under the same attention) and its
    ``p``; NaN where there is nothing to compare with.
    """
    rows = []
    for entry in table.entries:
        cell, same = entry.cell, entry.of_same
        about = {"trained": cell.row, "inference": cell.attention, "seeds": len(cell.lines)}
        shares = {"kept": cell.kept, "pairs": cell.pairs}
        score = {"score": entry.score.value, "low": entry.score.low, "high": entry.score.high}
        ratio = {"of_dense": entry.of_dense.ratio.value} if entry.of_dense else {}
        gain = {"gain": same.difference.value, "p": same.p_value} if same else {}
        rows.append(about | shares | score | ratio | gain)
    columns = ["trained", "inference", "seeds", "kept", "pairs", "score", "low", "high", "of_dense", "gain", "p"]
    return pd.DataFrame(rows, columns=columns)


def matrix(table: Table) -> pd.DataFrame:
    """Scores, a row for each training and a column for each attention; NaN where there is no result."""
    rows = dict.fromkeys(cell.row for cell in table.cells)
    found = {row: [table.entry(row, name) for name in table.attentions] for row in rows}
    scores = [[entry.score.value if entry else math.nan for entry in each] for each in found.values()]
    return pd.DataFrame(scores, index=list(found), columns=table.attentions)


def bars(cells: Cells) -> pd.DataFrame:
    """A row for each bar: what it asks for, what was reached, by which cells, and the verdict."""
    return pd.DataFrame(Bars(cells).verdicts(), columns=["name", "required", "reached", "by", "verdict"])


def survival(cells: Cells) -> pd.DataFrame:
    """A row for each trained cell: the share of supporting and answer tokens that a head keeps, before and after."""
    rows: list[dict[str, Any]] = []
    for item in evidence.pairs(cells):
        about = {"questions": item.data_set, "trained": item.after.row, "inference": item.after.attention}
        shares = {f"{name} {when}": item.share(when, name) for name in ("gold", "answer") for when in evidence.WHEN}
        rows.append({**about, "chance": item.chance, **shares})
    return pd.DataFrame(rows)


def answers(table: Table, number: int) -> pd.DataFrame:
    """What each model of a part, seed by seed, answered to one question.

    Args:
        table: the part on a data set.
        number: of the question, from 0 on.

    Raises:
        UserError: there is no such question, or the data set has no answers.
    """
    asked = min((cell.line["questions"] for cell in table.cells), default=0)
    if table.measure == "loss" or not 0 <= number < asked:
        raise UserError(f"number: {number} is not allowed; {table.part} has answers to {asked} questions, from 0 on")
    rows: list[dict[str, Any]] = []
    for cell in table.cells:
        for line in cell.lines:
            about = {"trained": cell.row, "inference": cell.attention, "seed": line["seed"]}
            rows.append(about | {"answer": line["text"][number], "score": line[table.measure][number]})
    return pd.DataFrame(rows)


def by_place(table: Table, data: str) -> pd.DataFrame:
    """Scores by where the answer stands, a row for each cell; the columns say of how many questions each is.

    Args:
        table: a part that names a rule which it holds others against.
        data: folder of the study's token files, in this folder or one above.

    Raises:
        UserError: the part names no rule, or the folder has other questions.
    """
    rows: list[dict[str, Any]] = []
    for cell, found in places.by_place(table, nearest(data)):
        scores = {place.label: place.score.value if place.score else math.nan for place in found}
        rows.append({"trained": cell.row, "inference": cell.attention, **scores})
    return pd.DataFrame(rows)


def question(table: Table, number: int, data: str) -> dict[str, Any]:
    """A question's text and the answers that count as right.

    Args:
        table: the part on a data set that has the question.
        number: of the question, from 0 on.
        data: folder of the study's token files, in this folder or one above.

    Raises:
        UserError: there is no such file, or the results are of other questions.
    """
    file = places.questions_of(table, nearest(data))
    example = file.examples[number]
    prompt = example["input_ids"][: example["prompt_length"]]
    text = str(_tokenizer(table.study).decode(prompt[-_TAIL:], skip_special_tokens=True))
    asked = text.rpartition(INSTRUCTION)[2].strip().partition("\n")[0]
    return {"question": asked.removeprefix("Question: "), "answers": list(example["answers"])}


def _tokenizer(study: Study) -> PreTrainedTokenizerBase:
    with warnings.catch_warnings():
        # Of tqdm, which misses ipywidgets in a notebook.
        warnings.filterwarnings("ignore", message="IProgress not found")
        from lrsa_lit.models import Backbone

        return Backbone(**study.common["model"]["backbone"]).tokenizer
