"""Callbacks that write the answers of evaluations as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lrsa_lit.callbacks.evaluation_facts import facts
from lrsa_lit.callbacks.line_file import LineFile
from lrsa_lit.data.collate import Batch
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation.answers import Answers, scores
from lrsa_lit.io import write_atomically
from lrsa_lit.run_labels import OWN
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.artifacts import upload

_ABOUT = ("id", "data_set", "task", "gold", "prompt_tokens", "answer_tokens")
"""Keys of a line of answers that describe the question."""


class LineWriter:
    """Base class of callbacks that write one line per example in some stages."""

    title = "Answers"
    stages: tuple[str, ...]
    lines: LineFile

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Raise a UserError if the file exists; the command line calls this before it prepares anything."""
        if stage in self.stages:
            self.lines.check()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file now, so that an unwritable folder fails before answers are generated."""
        if stage in self.stages:
            self.check_settings(pl_module, stage)
            self.lines.begin(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the lines written so far."""
        self.lines.stop()


class PredictionWriter(LineWriter, BasePredictionWriter):
    """Write predictions as JSON lines: id, prediction, gold, f1, exact_match, token counts, config hash.

    The file is also an artifact of the run.

    Args:
        path: the file, which must not exist; null is ``predictions.jsonl`` in the run's folder. Its name ends with
            ``.partial`` until all predictions are written.
    """

    stages = ("predict",)

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.lines = LineFile("path", path, "predictions.jsonl")

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        """Write the predictions of a batch."""
        rows = zip(batch["position"], batch["repeated"], strict=True)
        self.lines.write(prediction, [position for position, repeated in rows if not repeated])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its final name."""
        self.lines.finish(trainer)


class AnswerWriter(LineWriter, Callback):
    """Write each question's losses, answers and scores as JSON lines; only in ``lrsa test`` and ``lrsa validate``.

    The lines are in the order of the split. A line has ``id``, ``data_set``, ``task``, ``gold``, ``prompt_tokens`` and
    ``answer_tokens`` (of the reference answer). Under the name of each attention (``LRSA`` is the run's own), it has
    the summed ``loss`` of these tokens and, if answers are generated, ``prediction``, ``f1``, ``exact_match`` and
    ``recall``.

    A file of the same name with the suffix ``.json`` describes the evaluation:
    :func:`lrsa_lit.callbacks.evaluation_facts.facts`. Both files are also artifacts of the run.

    Args:
        path: the file, which must not exist; null is ``answers.jsonl`` in the run's folder. Its name ends with
            ``.partial`` until all answers are written.

    Attributes:
        more: entries that other callbacks add to the ``.json`` file.
    """

    only_validates = True
    stages = ("validate", "test")

    def __init__(self, path: str | None = None) -> None:
        self.lines = LineFile("path", path, "answers.jsonl")
        self.more: dict[str, Any] = {}
        self._began = 0.0

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Also raise a UserError if an attention has the name of another key, which it would overwrite."""
        super().check_settings(task, stage)
        taken = sorted({*getattr(task, "attentions", ())} & {*_ABOUT, OWN})
        if taken and stage in self.stages:
            raise UserError("evaluate", taken[0], "a name that is not a key of the answers already")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file, and start the clock."""
        super().setup(trainer, pl_module, stage)
        self.more, self._began = {}, time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Write the answers of a batch, except for rows that another device also has."""
        rows = [row for row, repeated in enumerate(batch["repeated"]) if not repeated]
        positions = [batch["position"][row] for row in rows]
        self.lines.write((_answers(batch, row, outputs) for row in rows), positions)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Do the same in ``lrsa validate``, but not in a fit."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its final name, and write the file that describes the evaluation."""
        self.lines.finish(trainer)
        if self.lines.written:
            path, seconds = self.lines.written[0].with_suffix(".json"), time.perf_counter() - self._began
            about = facts(trainer, cast(LongContextQA, pl_module)) | {"seconds": round(seconds, 1), **self.more}
            text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
            write_atomically(path, lambda file: file.write(text.encode()))
            upload(trainer, [path])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same in ``lrsa validate``, but not in a fit."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)


def _answers(batch: Batch, row: int, found: Mapping[str, Answers]) -> dict[str, Any]:
    gold, match = batch["answers"][row], batch["match"][row]
    tokens = next(iter(found.values())).tokens[row]
    about = batch["id"][row], batch["source"][row], batch["task"][row], list(gold), batch["prompt_length"][row], tokens
    line: dict[str, Any] = dict(zip(_ABOUT, about, strict=True))
    for name, answers in found.items():
        line[name or OWN] = {"loss": answers.loss[row]}
        if answers.text is not None:
            text = answers.text[row]
            of_text = scores(text, gold, match)
            line[name or OWN] |= {"prediction": text, "f1": of_text["f1"], "exact_match": of_text["em"],
                                  "recall": of_text["recall"]}  # fmt: skip
    return line
