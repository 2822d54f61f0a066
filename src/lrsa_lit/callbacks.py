"""What the command line shows and writes: the summary of a fit or an evaluation, and answers as JSON lines."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.table import Table

from lrsa_lit.errors import UserError
from lrsa_lit.metrics import exact_match, f1_score, recall

if TYPE_CHECKING:
    from lrsa_lit.data.collate import Batch
    from lrsa_lit.data.module import QADataModule, Split
    from lrsa_lit.tasks import LongContextQA

_SHOWN = {"loss": "answer loss", "f1": "F1", "em": "exact match"}
_EVALUATED = {**_SHOWN, "recall": "recall"}
_STAGES = {"val": "Validation", "test": "Test"}
_OWN = "LRSA"
"""The run's own attention."""
_ABOUT = ("id", "data_set", "task", "gold")
"""What a line of the answers says of the question."""


class FitSummary(Callback):
    """Keep what each validation found, for a table: every attention's scores before and after training.

    "Before" is the validation that ran at step 0, "after" the last one.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit goes on from, so that its table begins where the run began."""
        return {"history": [[step, values] for step, values in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the validations of the run so far."""
        self.history = [(step, values) for step, values in state_dict["history"]]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a whole validation."""
        if trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.history.append((trainer.global_step, values))

    def show(self, trainer: Trainer) -> None:
        """Print the summary on the first process, once the progress bar is gone."""
        if not trainer.is_global_zero:
            return
        console = Console()
        if self.history:
            console.print(summary_table(self.history))
        for line in where_recorded(trainer):
            # One fact a line, unwrapped, so that paths and commands can be copied.
            console.print(line, soft_wrap=True, highlight=False)


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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before the answers are generated, not after, where the folder cannot be written."""
        if stage == "test":
            self._check_names(pl_module)
            self._answers = []
            self._lines.begin(trainer)

    @staticmethod
    def _check_names(pl_module: LightningModule) -> None:
        """An attention of the name of another key would take its place without a word."""
        names = {prefix.removesuffix("/") for prefix in getattr(pl_module, "attentions", ())}
        if taken := sorted(names & {*_ABOUT, _OWN}):
            raise UserError(f"model.evaluate: the name {taken[0]!r} is not allowed; each line of the answers has it")

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


def show_evaluation(trainer: Trainer, model: LongContextQA, data: QADataModule, split: Split) -> None:
    """Print what an evaluation found, and what it left out, on the first process."""
    if not trainer.is_global_zero:
        return
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    console = Console()
    console.print(evaluation_table(metrics, list(model.attentions), data, split))
    for line in evaluation_notes(data, split, model.max_new_tokens):
        console.print(line, soft_wrap=True, highlight=False)


def evaluation_table(metrics: Mapping[str, float], prefixes: Sequence[str], data: QADataModule, split: Split) -> Table:
    """A line for each part of an evaluation with its own score, then all scores of all questions, its own in bold.

    Args:
        metrics: as the task logs them.
        prefixes: of the attentions in the names of metrics, such as "" (the run's own, shown as LRSA) and "dense/".
        data: says what the parts are.
        split: "val" or "test".
    """
    questions = int(metrics[f"{split}/count"])
    table = Table(title=f"{_STAGES[split]} on {questions} question{'' if questions == 1 else 's'}")
    for name in ("part", "questions", "score"):
        table.add_column(name, justify="right" if name == "questions" else "left")
    for prefix in prefixes:
        table.add_column(prefix.removesuffix("/") or _OWN, justify="right")

    def add(part: str, group: str, score: str) -> None:
        values = [metrics[f"{split}/{prefix}{group}{score}"] for prefix in prefixes]
        # Fewer than all batches may leave a part without a question.
        shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in values]
        style = "bold" if score == data.score_of(group.removesuffix("/")) else None
        table.add_row(part, f"{metrics[f'{split}/{group}count']:.0f}", _EVALUATED[score], *shown, style=style)

    for group in data.groups(split):
        add(group, f"{group}/", data.score_of(group))
    table.add_section()
    for score in _EVALUATED:
        add("all", "", score)
    return table


def evaluation_notes(data: QADataModule, split: Split, new_tokens: int) -> list[str]:
    """Lines on questions that were left out or cut, and on answers that were given too little room."""
    report = data.report[split]

    def total(what: str) -> int:
        return sum(count for name, count in report.items() if name.rpartition("/")[2] == what)

    kept = total("kept")
    budget = f"data.init_args.max_tokens ({data.max_tokens})"
    notes = {
        f"Left out, as they exceed {budget}: {{}} questions": total("too_long"),
        f"Cut in the middle of the context, as they exceed {budget}: {{}} of {kept} questions": total("truncated"),
        f"Longer than model.max_new_tokens ({new_tokens}), so never given in full: {{}} of {kept} reference answers": (
            data.unanswerable(split, new_tokens)
        ),
    }
    return [line.format(count) for line, count in notes.items() if count]


def _answers(batch: Batch, row: int, outputs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    gold, match = batch["answers"][row], batch["match"][row]
    about = batch["id"][row], batch["source"][row], batch["task"][row], list(gold)
    line: dict[str, Any] = dict(zip(_ABOUT, about, strict=True))
    scores = {"f1": f1_score, "exact_match": exact_match, "recall": recall}
    for name, texts in outputs.items():
        values = {score: measure(texts[row], gold, match) for score, measure in scores.items()}
        line[name or _OWN] = {"prediction": texts[row], **values}
    return line


def summary_table(history: Sequence[tuple[int, dict[str, float]]]) -> Table:
    """First and last entry side by side: a row for each attention, as ``LRSA`` (the run's own rule) or by its name."""
    (first_step, first), (last_step, last) = history[0], history[-1]
    questions = int(last.get("val/count", 0))
    plural = "" if questions == 1 else "s"
    table = Table(title=f"Validation on {questions} question{plural}, step {first_step} → step {last_step}")
    table.add_column("inference")
    for label in _SHOWN.values():
        table.add_column(label, justify="right")
    for prefix in sorted({name.removeprefix("val/").rpartition("/")[0] for name in last}):
        stem = f"val/{prefix}/" if prefix else "val/"
        pairs = [(first.get(stem + name, math.nan), last.get(stem + name, math.nan)) for name in _SHOWN]
        # The parts of an evaluation have no loss of their own.
        shown = ("" if math.isnan(after) else f"{before:.3f} → {after:.3f}" for before, after in pairs)
        table.add_row(prefix or _OWN, *shown)
    return table


def where_recorded(trainer: Trainer) -> list[str]:
    """Lines that say where checkpoints and the run are, and how to look at it."""
    lines = []
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if checkpoint:
        lines.append(f"Best checkpoint: {checkpoint}")
    uri = getattr(trainer.logger, "tracking_uri", None)
    if uri is not None and trainer.logger is not None:
        experiment = str(getattr(trainer.logger, "experiment_name", trainer.logger.name))
        lines.append(f"Run {trainer.logger.version} of experiment {experiment!r} in {uri}")
        lines.append(f"Compare its runs: lrsa ui --store {uri} --experiment {shlex.quote(experiment)}")
    return lines
