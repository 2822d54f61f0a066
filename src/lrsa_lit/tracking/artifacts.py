"""Where a run's callbacks leave files, and how those reach its MLflow run."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from lrsa_lit.tracking.logger import MLflowRun, run_of
from lrsa_lit.tracking.run_record import RecordConfig

_made: weakref.WeakKeyDictionary[Trainer, Path] = weakref.WeakKeyDictionary()
"""The folders of trainers without an MLflow run."""


def run_folder(trainer: Trainer) -> Path:
    """The folder for files of a trainer's run, on the first process.

    It is where the checkpoints of the MLflow run are. Without one it is a new folder, such as ``test-1``, which the
    first call makes, or raises an OSError.
    """
    root, logger = Path(trainer.default_root_dir), trainer.logger
    if isinstance(logger, MLflowRun):
        return logger.folder(root)
    if trainer not in _made:
        _made[trainer] = _new_folder(root / _command(trainer))
    return _made[trainer]


def shared_run_folder(trainer: Trainer) -> Path:
    """The :func:`run_folder` of the first process, on every process. Every process must call it."""
    folder: Path | OSError | None = None
    if trainer.is_global_zero:
        try:
            folder = run_folder(trainer)
        except OSError as error:
            folder = error
    folder = trainer.strategy.broadcast(folder)
    if isinstance(folder, OSError):
        raise folder
    assert folder is not None
    return folder


def numbered(path: Path) -> Iterator[Path]:
    """A path, then the names to try where it is taken: ``answers-2.jsonl``, ``answers-3.jsonl`` and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def upload(trainer: Trainer, files: Sequence[Path], folder: str | None = None) -> None:
    """Make files artifacts of an MLflow run, in the background; the files stay where they are."""
    if (logger := run_of(trainer)) is None:
        return
    for file in files:
        what = f"{folder}/{file.name}" if folder else file.name
        logger.deliver(what, logger.experiment.log_artifact, str(file), folder)


def _command(trainer: Trainer) -> str:
    """The command that is run: a fit may begin with a validation, so the trainer's stage does not say it."""
    of_cli = [callback.command for callback in trainer.callbacks if isinstance(callback, RecordConfig)]  # type: ignore[attr-defined]
    return of_cli[0] if of_cli else str(trainer.state.fn and trainer.state.fn.value)


def _new_folder(path: Path) -> Path:
    """Make the first of ``path-1``, ``path-2`` and so on that does not exist."""
    for number in itertools.count(1):
        folder = path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError
