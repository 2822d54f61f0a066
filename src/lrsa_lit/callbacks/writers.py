"""The answers of evaluations as JSON lines."""

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
"""What a line of the answers says of the question."""


class LineWriter:
    """What callbacks have in common that write a line for each example of some stages."""

    title = "Answers"
    stages: tuple[str, ...]
    lines: LineFile

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Raise a UserError if the file exists. The command line asks before it records or prepares anything."""
        if stage in self.stages:
            self.lines.check()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the answers are generated, not after, where the folder cannot be written."""
        if stage in self.stages:
            self.check_settings(pl_module, stage)
            self.lines.begin(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what there is."""
        self.lines.stop()


class PredictionWriter(LineWriter, BasePredictionWriter):
    """Write predictions as JSON lines: id, prediction, gold, f1, exact_match, token counts, config hash.

    The file is an artifact of the run too.

    Args:
        path: the file, which must not exist; null is ``predictions.jsonl`` in the run's folder. It has the end
            ``.partial`` until all predictions are made.
    """

    stages = ("predict",)

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.lines = LineFile("path", path, "predictions.jsonl")

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        """Write the lines of a batch."""
        rows = zip(batch["position"], batch["repeated"], strict=True)
        self.lines.write(prediction, [position for position, repeated in rows if not repeated])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self.lines.finish(trainer)


class AnswerWriter(LineWriter, Callback):
    """Write what a test, or a validation by itself, finds for each question, as JSON lines in the order of the split.

    A line has ``id``, ``data_set``, ``task``, ``gold``, ``prompt_tokens``, ``answer_tokens`` (of the reference answer)
    and, under the name of each attention (``LRSA`` is the run's own), the summed ``loss`` of these tokens and, where
    answers are generated, ``prediction``, ``f1``, ``exact_match`` and ``recall``.

    Beside it lies a file of the same name with the end ``.json``, which says what was evaluated:
    :func:`lrsa_lit.callbacks.evaluation_facts.facts`. Both are artifacts of the run too.

    Args:
        path: the file, which must not exist; null is ``answers.jsonl`` in the run's folder. It has the end ``.partial``
            until all answers are there.

    Attributes:
        more: what other callbacks add to the file that says what was evaluated.
    """

    only_validates = True
    stages = ("validate", "test")

    def __init__(self, path: str | None = None) -> None:
        self.lines = LineFile("path", path, "answers.jsonl")
        self.more: dict[str, Any] = {}
        self._began = 0.0

    def check_settings(self, task: LightningModule, stage: str) -> None:
        """Refuse also an attention of the name of another key, whose place it would take without a word."""
        super().check_settings(task, stage)
        taken = sorted({*getattr(task, "attentions", ())} & {*_ABOUT, OWN})
        if taken and stage in self.stages:
            raise UserError("evaluate", taken[0], "a name that no line of the answers has already")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file, and take the time."""
        super().setup(trainer, pl_module, stage)
        self.more, self._began = {}, time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Write the answers of a batch, but not of rows that another device has as well."""
        rows = [row for row, repeated in enumerate(batch["repeated"]) if not repeated]
        positions = [batch["position"][row] for row in rows]
        self.lines.write((_answers(batch, row, outputs) for row in rows), positions)

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """The same for a validation, unless it is one of a fit."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name, and write what was evaluated."""
        self.lines.finish(trainer)
        if self.lines.written:
            path, seconds = self.lines.written[0].with_suffix(".json"), time.perf_counter() - self._began
            about = facts(trainer, cast(LongContextQA, pl_module)) | {"seconds": round(seconds, 1), **self.more}
            text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
            write_atomically(path, lambda file: file.write(text.encode()))
            upload(trainer, [path])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a validation, unless it is one of a fit."""
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
