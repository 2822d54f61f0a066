"""A callback that saves the trained gates of heads as files for DuoAttention and as a plot."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lrsa_lit.analysis import plots
from lrsa_lit.io import write_atomically
from lrsa_lit.tracking.artifacts import run_folder, upload

FOLDER = "gates"
"""Folder in the run's folder, and among its artifacts."""

_log = logging.getLogger(__name__)


class GatesRecord(Callback):
    """Save the gates with each checkpoint and at the end of a fit; the command line adds it to fits that train gates.

    In the run's folder, beside its checkpoints, ``gates/step000100.json`` has the gates at that step, and
    ``gates.json`` the final ones: a list of heads' gates per layer. The settings ``gates`` of DuoAttention and
    ``ranking`` of ``head_top_k`` read these files. The final gates are also logged as MLflow artifacts, with a plot.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the gates of the checkpoint."""
        if trainer.is_global_zero:
            self._write(trainer, pl_module, f"{FOLDER}/step{trainer.global_step:06d}.json")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and plot the final gates."""
        if not trainer.is_global_zero:
            return
        written, gates = self._write(trainer, pl_module, f"{FOLDER}.json"), _gates(pl_module)
        picture = written.with_suffix(".png")
        plots.gates(gates, f"step {trainer.global_step}").savefig(picture)
        upload(trainer, [written, picture], FOLDER)
        _log.info("Gates of %d layers x %d heads: %s", len(gates), len(gates[0]), written)

    def _write(self, trainer: Trainer, task: Any, name: str) -> Any:
        path, text = run_folder(trainer) / name, json.dumps(_gates(task))
        write_atomically(path, lambda file: file.write(text.encode()))
        return path


def _gates(task: Any) -> Sequence[Sequence[float]]:
    found: Sequence[Sequence[float]] = task.head_gates.table
    return found
