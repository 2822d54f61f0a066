"""What the model answers, as a table in the run: the same questions at each validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.metrics import f1_score
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.logger import MLflowRun

FILE = "predictions.json"
"""The table's name in MLflow."""

_QUESTION_TOKENS = 64
"""The end of a prompt that is shown: the question stands last."""


class SamplePredictions(Callback):
    """Log the answers to the first questions of each validation, under each attention, as a table.

    Args:
        count: questions; 0 logs nothing.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count
        self._rows: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first rows."""
        if trainer.sanity_checking or not isinstance(pl_module, LongContextQA):
            return
        for row in range(min(len(batch["id"]), self.count - len(self._rows))):
            question = pl_module.tokenizer.decode(
                batch["prompt_ids"][row][-_QUESTION_TOKENS:], skip_special_tokens=True
            )
            gold = batch["answers"][row]
            values = {"step": trainer.global_step, "id": batch["id"][row], "question": question.strip()}
            values["gold"] = " | ".join(gold)
            for name, texts in outputs.items():
                values[name or "LRSA"] = texts[row]
                values[f"{name or 'LRSA'} F1"] = f1_score(texts[row], gold, batch["match"][row])
            self._rows.append(values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the rows to the table."""
        rows, self._rows, logger = self._rows, [], trainer.logger
        if not rows or not isinstance(logger, MLflowRun) or not trainer.is_global_zero:
            return
        table = {name: [row[name] for row in rows] for name in rows[0]}
        logger.deliver(FILE, lambda: logger.experiment.log_table(logger.run_id, table, FILE))
