"""A study's results for notebooks, and the answers to single questions."""

from __future__ import annotations

import warnings
from typing import Any

import pandas as pd

from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report.cells import Cells, Table
from lrsa_lit.experiments.report.document import results_of
from lrsa_lit.experiments.report.places import questions_of
from lrsa_lit.experiments.study import Study
from lrsa_lit.paths import nearest

# Of tqdm, which misses ipywidgets in a notebook.
warnings.filterwarnings("ignore", message="IProgress not found")

_TAIL = 400
"""Tokens at the end of a prompt in which its question is looked for."""


def load(results: str, study: Study) -> Cells:
    """The results of a study.

    Args:
        results: their file, in this folder or one above.
        study: the study.

    Raises:
        UserError: there are no results.
    """
    return Cells(study, results_of(study, nearest(results)))


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
        raise UserError("number", number, f"from 0 to {asked - 1}, the questions that {table.part} has answers to")
    rows = [(cell.row, cell.attention, line["seed"], line["text"][number], line[table.measure][number])
            for cell in table.cells for line in cell.lines]  # fmt: skip
    return pd.DataFrame(rows, columns=["trained", "inference", "seed", "answer", "score"])


def question(table: Table, number: int, data: str) -> dict[str, Any]:
    """A question's text and the answers that count as right.

    Args:
        table: the part on a data set that has the question.
        number: of the question, from 0 on.
        data: folder of the study's data, in this folder or one above.

    Raises:
        UserError: there is no such file, or the results are of other questions.
    """
    example = questions_of(table, nearest(data))[number]
    from lrsa_lit.models import Backbone

    tokenizer = Backbone(**table.study.common["model"]["backbone"]).tokenizer
    text = str(tokenizer.decode(example["input_ids"][: example["prompt_length"]][-_TAIL:], skip_special_tokens=True))
    asked = text.rpartition(INSTRUCTION)[2].strip().partition("\n")[0]
    return {"question": asked.removeprefix("Question: "), "answers": list(example["answers"])}
