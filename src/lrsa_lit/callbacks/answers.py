"""The answers of evaluations as JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lrsa_lit.callbacks.line_file import LineFile
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation.metrics import exact_match, f1_score, recall
from lrsa_lit.names import OWN

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch

_ABOUT = ("id", "data_set", "task", "gold")
"""What a line of the answers says of the question."""

_STAGES = ("validate", "test")


class PredictionWriter(BasePredictionWriter):
    """Write predictions as JSON lines: id, prediction, gold, f1, exact_match, token counts, config hash.

    The file is an artifact of the run too.

    Args:
        path: the file, which must not exist; null is ``predictions.jsonl`` in the run's folder. It has the end
            ``.partial`` until all predictions are made.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.lines = LineFile("PredictionWriter.path", path, "predictions.jsonl")

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Refuse a path that would be overwritten.

        The command line asks before it records or prepares anything.

        Raises:
            UserError: the file exists.
        """
        if stage == "predict":
            self.lines.check()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the predictions are made, not after, where the folder cannot be written."""
        if stage == "predict":
            self.lines.begin(trainer)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the lines of a batch."""
        self.lines.write(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self.lines.finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what there is."""
        self.lines.stop()


class AnswerWriter(Callback):
    """Write the answers of a test or a validation by itself as JSON lines: id, data_set, task, gold and the answers.

    They stand under the names of the attentions, of which ``LRSA`` is the run's own; each has prediction, f1,
    exact_match and recall. The file is an artifact of the run too.

    Args:
        path: the file, which must not exist; null is ``answers.jsonl`` in the run's folder. It has the end ``.partial``
            until all answers are there.
    """

    only_validates = True

    def __init__(self, path: str | None = None) -> None:
        self.lines = LineFile("AnswerWriter.path", path, "answers.jsonl")

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Refuse an attention of the name of another key, whose place it would take without a word.

        The command line asks before it records or prepares anything.

        Raises:
            UserError: there is one, or the file exists.
        """
        if stage not in _STAGES:
            return
        names = {prefix.removesuffix("/") for prefix in getattr(task, "attentions", ())}
        if taken := sorted(names & {*_ABOUT, OWN}):
            raise UserError(f"model.evaluate: the name {taken[0]!r} is not allowed; each line of the answers has it")
        self.lines.check()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the answers are generated, not after, where the folder cannot be written."""
        if stage in _STAGES:
            self.check_settings(pl_module, stage)
            self.lines.begin(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the answers of a batch, but not of rows that another device has as well."""
        rows = [row for row, repeated in enumerate(batch["repeated"]) if not repeated]
        self.lines.write(_answers(batch, row, outputs) for row in rows)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same for a validation, unless it is one of a fit."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self.lines.finish(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a validation, unless it is one of a fit."""
        if trainer.state.fn == "validate":
            self.lines.finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what there is."""
        self.lines.stop()


def _answers(batch: Batch, row: int, outputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    gold, match = batch["answers"][row], batch["match"][row]
    about = batch["id"][row], batch["source"][row], batch["task"][row], list(gold)
    line: dict[str, Any] = dict(zip(_ABOUT, about, strict=True))
    scores = {"f1": f1_score, "exact_match": exact_match, "recall": recall}
    for name, texts in outputs.items():
        values = {score: measure(texts[row], gold, match) for score, measure in scores.items()}
        line[name or OWN] = {"prediction": texts[row], **values}
    return line
