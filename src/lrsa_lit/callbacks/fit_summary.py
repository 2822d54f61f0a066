"""What a fit shows at its end: every attention's scores before and after training, and where the run is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from lrsa_lit.checkpoints.form import check_form
from lrsa_lit.names import OWN, SCORES
from lrsa_lit.terminal import PlainConsole
from lrsa_lit.tracking.logger import MLflowRun


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
        """Take up the validations of the run so far.

        Raises:
            UserError: they are none.
        """
        for number, entry in enumerate(state_dict["history"]):
            check_form(entry, [0, {}], f"callbacks.FitSummary.history.{number}")
            check_form(list(entry[1].values()), [0.0] * len(entry[1]), f"callbacks.FitSummary.history.{number}.1")
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
        console = PlainConsole()
        if self.history:
            console.print(summary_table(self.history))
        for line in where_recorded(trainer):
            console.say(line)


def summary_table(history: Sequence[tuple[int, dict[str, float]]]) -> Table:
    """First and last entry side by side: a row for each attention, as ``LRSA`` (the run's own rule) or by its name.

    A single entry stands alone.
    """
    ends, last = [*history[:1], *history[1:][-1:]], history[-1][1]
    questions = int(last.get("val/count", 0))
    plural = "" if questions == 1 else "s"
    steps = " → ".join(f"step {step}" for step, _ in ends)
    table = Table(title=f"Validation on {questions} question{plural}, {steps}")
    table.add_column("inference")
    for label in SCORES.values():
        table.add_column(label, justify="right")
    for prefix in sorted({name.removeprefix("val/").rpartition("/")[0] for name in last}):
        stem = f"val/{prefix}/" if prefix else "val/"
        found = [[values.get(stem + name, math.nan) for _, values in ends] for name in SCORES]
        # The parts of an evaluation have no loss of their own.
        shown = ("" if math.isnan(scores[-1]) else " → ".join(f"{score:.3f}" for score in scores) for scores in found)
        table.add_row(prefix or OWN, *shown)
    return table


def where_recorded(trainer: Trainer) -> list[str]:
    """Lines that say where checkpoints and the run are, and how to look at it."""
    lines = []
    # Without a validation in training there is no best one.
    for kind, name in (("Best", "best_model_path"), ("Last", "last_model_path")):
        if checkpoint := getattr(trainer.checkpoint_callback, name, ""):
            lines.append(f"{kind} checkpoint: {checkpoint}")
            break
    return [*lines, *run_lines(trainer)]


def run_lines(trainer: Trainer) -> list[str]:
    """Lines that name the run and the command that compares it with others; none where nothing is recorded."""
    logger = trainer.logger
    if not isinstance(logger, MLflowRun):
        return []
    experiment = logger.experiment_name
    compare = shlex.join(["lrsa", "ui", "--store", logger.store, "--experiment", experiment])
    return [f"Run {logger.version} of experiment {experiment!r} in {logger.store}", f"Compare its runs: {compare}"]
