"""Callbacks that print and write the results of sentence encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from lrsa_lit.callbacks.end_of_run import ClosingSummary, ValidationHistory, show_answers
from lrsa_lit.callbacks.line_file import LineFile
from lrsa_lit.callbacks.writers import LineWriter
from lrsa_lit.tasks.sentence_recall import CONTROLS
from lrsa_lit.terminal import PlainConsole

_TITLES = {"": "encoder", "bm25": "BM25", "random": "random"}


class RecallSummary(ValidationHistory, ClosingSummary):
    """Print a table at the end of a fit: recall of supporting sentences before and after training."""

    def show(self, trainer: Trainer) -> None:
        """Print the summary on the first process, after the progress bar has closed."""
        if not trainer.is_global_zero:
            return
        if self.history:
            ends = [*self.history[:1], *self.history[1:][-1:]]
            steps = " → ".join(f"step {step}" for step, _ in ends)
            found = [values for _, values in ends]
            PlainConsole().print(_table(f"Validation on {found[-1]['val/count']:.0f} questions, {steps}", "val", found))
        show_answers(trainer)


class RecallWriter(LineWriter, Callback):
    """Write the recall for each question as JSON lines; only in ``lrsa test`` and ``lrsa validate``.

    The lines are in the order of the split. A line has ``id``, ``tokens`` of the context, and the number of
    ``supporting`` sentences. For ``encoder``, ``bm25`` and ``random``, it has the number of supporting sentences kept
    at each budget in percent. The file is also an artifact of the run.

    Args:
        path: the file, which must not exist; null is ``recalls.jsonl`` in the run's folder.
    """

    title = "Recalls"
    stages = ("validate", "test")
    only_validates = True

    def __init__(self, path: str | None = None) -> None:
        self.lines = LineFile("path", path, "recalls.jsonl")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Write the lines of a batch."""
        rows = zip(batch["position"], batch["repeated"], strict=True)
        self.lines.write(outputs["lines"], [position for position, repeated in rows if not repeated])

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Do the same in ``lrsa validate``, but not in a fit."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, *arguments)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its final name."""
        self.lines.finish(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same in ``lrsa validate``, but not in a fit."""
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)


def show_recalls(trainer: Trainer, split: str) -> None:
    """Print the results of an evaluation and the path of its file, on the first process."""
    if not trainer.is_global_zero:
        return
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    title = f"{'Test' if split == 'test' else 'Validation'} on {values[f'{split}/count']:.0f} questions"
    console = PlainConsole()
    console.print(_table(title, split, [values]))
    for name in values:
        if name.startswith(f"{split}/over_bm25/") and f"{name}_p" in values:
            low, high, p_value = (values[f"{name}_{end}"] for end in ("low", "high", "p"))
            told = f"{values[name]:+.3f} per question (95 % CI {low:+.3f} to {high:+.3f}, p = {p_value:.4f})"
            console.say(f"Encoder over BM25 at {name.rpartition('/')[2]} %: {told}")
    show_answers(trainer)


def _table(title: str, split: str, found: Sequence[Mapping[str, float]]) -> Table:
    """Recall by budget, with one row for the encoder and each control; several evaluations are joined by arrows."""
    stem = f"{split}/recall_"
    budgets = sorted((name.removeprefix(stem) for name in found[-1] if name.startswith(stem)), key=float)
    table = Table(title=title)
    table.add_column("sentences ranked by")
    for budget in budgets:
        table.add_column(f"recall at {budget} %", justify="right")
    for name in ("", *CONTROLS):
        of_name = f"{split}/{name}/recall_" if name else stem
        # Controls have the same recall in every evaluation.
        shown = found[-1:] if name else found
        cells = [" → ".join(f"{values[of_name + budget]:.3f}" for values in shown) for budget in budgets]
        table.add_row(_TITLES[name], *cells)
    return table
