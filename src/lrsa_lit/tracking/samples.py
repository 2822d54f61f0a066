"""What the model answers: a few questions of each validation as a table in the run, and all of the last as a file."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.evaluation.answers import scores
from lrsa_lit.run_labels import ANSWERS, OWN, QUESTIONS
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.logger import run_of

_QUESTION_TOKENS = 64
"""The end of a prompt that is shown: the question stands last."""


class SamplePredictions(Callback):
    """Log the answers of each validation, under each attention.

    The first ones are added to the table ``predictions.json``; all of them are ``predictions/val.jsonl``, which the
    next validation replaces. Of several processes the first one logs its own questions.

    Args:
        count: questions in the table; 0 logs none.
        all_answers: whether to log the file.
    """

    def __init__(self, count: int = 8, all_answers: bool = True) -> None:
        self.count = count
        self.all_answers = all_answers
        self._rows: list[dict[str, Any]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, whatever became of the validation before."""
        self._rows = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep what is to be logged."""
        if trainer.sanity_checking or not isinstance(pl_module, LongContextQA) or not pl_module.generate_answers:
            return
        rows = len(batch["id"])
        for row in range(rows if self.all_answers else min(rows, self.count - len(self._rows))):
            prompt = batch["prompt_ids"][row][-_QUESTION_TOKENS:]
            question = pl_module.tokenizer.decode(prompt, skip_special_tokens=True).strip()
            gold, match = batch["answers"][row], batch["match"][row]
            values = {"step": trainer.global_step, "id": batch["id"][row], "question": question}
            values["gold"] = " | ".join(gold)
            for name, answers in outputs.items():
                text = answers.text[row]
                found = scores(text, gold, match)
                values[name or OWN] = {"prediction": text, "f1": found["f1"], "em": found["em"]}
            self._rows.append(values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add to the table, and replace the file."""
        rows, self._rows, logger = self._rows, [], run_of(trainer)
        if not rows or logger is None:
            return
        if self.count:
            shown = [_flat(row) for row in rows[: self.count]]
            table = {name: [row[name] for row in shown] for name in shown[0]}
            logger.deliver(QUESTIONS, logger.experiment.log_table, table, QUESTIONS)
        if self.all_answers:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            logger.deliver(ANSWERS, logger.experiment.log_text, lines, ANSWERS)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: an attention's answer under its name, and the F1 beside it."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {name: value["prediction"], f"{name} F1": value["f1"]} if isinstance(value, dict) else {name: value}
    return flat
