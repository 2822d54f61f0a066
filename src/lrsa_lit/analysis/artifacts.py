"""Where a run's callbacks leave files, and how those reach its MLflow run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from lrsa_lit.tracking import MLflowRun


def run_folder(trainer: Trainer) -> Path:
    """Of the run, where its checkpoints are as well; without a logger the trainer's own."""
    run = () if trainer.logger is None else (str(trainer.logger.name), str(trainer.logger.version))
    return Path(trainer.default_root_dir).joinpath(*run)


def upload(trainer: Trainer, files: Sequence[Path], folder: str | None = None) -> None:
    """Make files artifacts of an MLflow run, in the background; the files stay where they are."""
    logger = trainer.logger
    if not isinstance(logger, MLflowRun):
        return
    for file in files:
        send = functools.partial(logger.experiment.log_artifact, logger.run_id, str(file), folder)
        logger.deliver(f"{folder}/{file.name}" if folder else file.name, send)
