"""Logging of the model's answers: some of each validation as a table, and all of the last one as a file."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.evaluation.answers import scores
from lrsa_lit.io import write_atomically
from lrsa_lit.run_labels import ANSWERS, OWN, PAGE, QUESTIONS
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.artifacts import harmless, loggers_of, run_folder, show_table
from lrsa_lit.tracking.logger import run_of

_MOST_SHOWN = 400
"""Most characters of a question in the table: those at its end, because a chat's message may hold a whole text."""

_STYLE = (
    "table { border-collapse: collapse; font: 14px sans-serif } "
    "th, td { border: 1px solid #ccc; padding: 6px; text-align: left; vertical-align: top; white-space: pre-wrap } "
    "th { background: #eee } td { min-width: 4em; max-width: 36em }"
)


class SamplePredictions(Callback):
    """Log the answers of each validation, under each attention.

    The first answers are added to the table ``predictions.json`` and shown on the page ``predictions.html``; all
    answers are in ``predictions/val.jsonl``. The next validation replaces the page and the file. With several
    processes, only the first one logs its questions. Other loggers that can show tables also get the table. Without
    MLflow, the page and the file are written to the run's folder.

    Args:
        count: number of questions in the table; 0 logs no table.
        all_answers: whether to log the file with all answers.
    """

    def __init__(self, count: int = 8, all_answers: bool = True) -> None:
        self.count = count
        self.all_answers = all_answers
        self._rows: list[dict[str, Any]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the answers of an earlier validation."""
        self._rows = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the answers that are to be logged."""
        if trainer.sanity_checking or not isinstance(pl_module, LongContextQA) or not pl_module.generate_answers:
            return
        rows = len(batch["id"])
        for row in range(rows if self.all_answers else min(rows, self.count - len(self._rows))):
            gold, match = batch["answers"][row], batch["match"][row]
            values = {"step": trainer.global_step, "id": batch["id"][row], "question": batch["question"][row]}
            values["gold"] = " | ".join(gold)
            for name, answers in outputs.items():
                text = answers.text[row]
                found = scores(text, gold, match)
                values[name or OWN] = {"prediction": text, "f1": found["f1"], "em": found["em"]}
            self._rows.append(values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extend the table, and replace the page and the file."""
        rows, self._rows, logger = self._rows, [], run_of(trainer)
        if not rows or not loggers_of(trainer) or not trainer.is_global_zero:
            return
        shown = [table_row(row) for row in rows[: self.count]]
        if shown:
            show_table(trainer, PAGE.removesuffix(".html"), shown)
        if logger is None:
            with harmless(PAGE):
                self._keep(run_folder(trainer), shown, rows)
            return
        if shown:
            table = {name: [row[name] for row in shown] for name in shown[0]}
            logger.deliver(QUESTIONS, logger.experiment.log_table, table, QUESTIONS)
            logger.deliver(PAGE, logger.experiment.log_text, page(shown), PAGE)
        if self.all_answers:
            logger.deliver(ANSWERS, logger.experiment.log_text, _lines(rows), ANSWERS)

    def _keep(self, folder: Path, shown: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the page and the file to the run's folder."""
        texts = ({PAGE: page(shown)} if shown else {}) | ({ANSWERS: _lines(rows)} if self.all_answers else {})
        for name, text in texts.items():
            write_atomically(folder / name, functools.partial(_write, text))


def _write(text: str, file: IO[bytes]) -> None:
    file.write(text.encode())


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """An HTML page with a table of rows that have the same columns; all text is escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    lines = ("".join(f"<td>{html.escape(_shown(value))}</td>" for value in row.values()) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<!doctype html><meta charset='utf-8'><style>{_STYLE}</style><table><tr>{head}</tr>{body}</table>"


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: the end of the question, and each attention's answer as ``NAME`` and F1 as ``NAME F1``."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {name: value["prediction"], f"{name} F1": value["f1"]} if isinstance(value, dict) else {name: value}
    if len(flat["question"]) > _MOST_SHOWN:
        flat["question"] = f"…{flat['question'][-_MOST_SHOWN:]}"
    return flat
