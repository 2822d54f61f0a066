"""Where a run's callbacks leave files, and how those reach its MLflow run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from lrsa_lit.tracking.logger import MLflowRun


def run_folder(trainer: Trainer) -> Path:
    """Of the run, where its checkpoints are as well; without a logger the trainer's own."""
    run = () if trainer.logger is None else (str(trainer.logger.name), str(trainer.logger.version))
    return Path(trainer.default_root_dir).joinpath(*run)


def new_folder(trainer: Trainer) -> Path:
    """A folder for what one evaluation leaves: the run's, or without a run ``test-1`` and so on, which is made.

    All processes must ask, and get the same.

    Raises:
        OSError: it cannot be made.
    """
    if isinstance(trainer.logger, MLflowRun):
        return Path(trainer.strategy.broadcast(run_folder(trainer)))
    made: Path | OSError | None = None
    if trainer.is_global_zero:
        try:
            made = _numbered(Path(trainer.default_root_dir), str(trainer.state.fn and trainer.state.fn.value))
        except OSError as error:
            made = error
    made = trainer.strategy.broadcast(made)
    if isinstance(made, OSError):
        raise made
    assert made is not None
    return made


def _numbered(root: Path, command: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = root / f"{command}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def upload(trainer: Trainer, files: Sequence[Path], folder: str | None = None) -> None:
    """Make files artifacts of an MLflow run, in the background; the files stay where they are."""
    logger = trainer.logger
    if not isinstance(logger, MLflowRun):
        return
    for file in files:
        send = functools.partial(logger.experiment.log_artifact, logger.run_id, str(file), folder)
        logger.deliver(f"{folder}/{file.name}" if folder else file.name, send)
