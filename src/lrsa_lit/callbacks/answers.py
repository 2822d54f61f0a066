"""Answers as JSON lines: of the test split, and predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from lrsa_lit.errors import UserError
from lrsa_lit.metrics import exact_match, f1_score, recall
from lrsa_lit.names import OWN

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch

_ABOUT = ("id", "data_set", "task", "gold")
"""What a line of the answers says of the question."""


class PredictionWriter(BasePredictionWriter):
    """Write predictions as JSON lines: id, prediction, gold, f1, exact_match, token counts, config hash.

    Args:
        path: the file; it appears only when all predictions are made.
    """

    def __init__(self, path: str = "runs/predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self._lines = _LineFile("PredictionWriter.path", Path(path))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the predictions are made, not after, where the folder cannot be written."""
        if stage == "predict":
            self._lines.begin(trainer)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all lines."""
        target = self._lines.write(trainer, (line for batch in predictions for line in batch))
        Console().print(f"Predictions: {target}", soft_wrap=True, highlight=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._lines.discard(trainer)


class AnswerWriter(Callback):
    """Write the answers of a test as JSON lines: id, data_set, task, gold and, for each attention, what it gave.

    ``LRSA`` is the run's own attention; each has prediction, f1, exact_match and recall.

    Args:
        path: the file; it appears only when all answers are there.
    """

    def __init__(self, path: str = "runs/answers.jsonl") -> None:
        self._lines = _LineFile("AnswerWriter.path", Path(path))
        self._answers: list[dict[str, Any]] = []

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Refuse an attention of the name of another key, whose place it would take without a word.

        The command line asks before it records or prepares anything.

        Raises:
            UserError: there is one.
        """
        names = {prefix.removesuffix("/") for prefix in getattr(task, "attentions", ())}
        if stage == "test" and (taken := sorted(names & {*_ABOUT, OWN})):
            raise UserError(f"model.evaluate: the name {taken[0]!r} is not allowed; each line of the answers has it")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the answers are generated, not after, where the folder cannot be written."""
        if stage == "test":
            self.check_settings(pl_module, stage)
            self._answers = []
            self._lines.begin(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers of a batch, but not of rows that another device has as well."""
        rows = [row for row, repeated in enumerate(batch["repeated"]) if not repeated]
        self._answers.extend(_answers(batch, row, outputs) for row in rows)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all lines."""
        target = self._lines.write(trainer, self._answers)
        Console().print(f"Answers: {target}", soft_wrap=True, highlight=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._lines.discard(trainer)


class _LineFile:
    """A file of JSON lines that appears when it is complete; of several processes each has its own."""

    def __init__(self, key: str, path: Path) -> None:
        self._key = key
        self._path = path

    def begin(self, trainer: Trainer) -> None:
        if self._path.is_dir():
            raise UserError(f"{self._key}: {self._path} is a folder; it must be a file")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._partial(trainer).touch()
        except OSError as error:
            raise UserError(f"{self._key}: {self._path} cannot be written ({error.strerror})") from None

    def write(self, trainer: Trainer, lines: Iterable[Any]) -> Path:
        partial = self._partial(trainer)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        target = self._path if trainer.world_size == 1 else self._path.with_suffix(f".{trainer.global_rank}.jsonl")
        partial.replace(target)
        return target

    def discard(self, trainer: Trainer) -> None:
        self._partial(trainer).unlink(missing_ok=True)

    def _partial(self, trainer: Trainer) -> Path:
        return self._path.with_name(f".{self._path.name}.{trainer.global_rank}.partial")


def _answers(batch: Batch, row: int, outputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    gold, match = batch["answers"][row], batch["match"][row]
    about = batch["id"][row], batch["source"][row], batch["task"][row], list(gold)
    line: dict[str, Any] = dict(zip(_ABOUT, about, strict=True))
    scores = {"f1": f1_score, "exact_match": exact_match, "recall": recall}
    for name, texts in outputs.items():
        values = {score: measure(texts[row], gold, match) for score, measure in scores.items()}
        line[name or OWN] = {"prediction": texts[row], **values}
    return line
