"""The folder for files of a run's callbacks, and their upload to the MLflow run."""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lrsa_lit.errors import message_of
from lrsa_lit.io import write_atomically
from lrsa_lit.run_labels import PICTURES
from lrsa_lit.tracking.logger import MLflowRun, run_of
from lrsa_lit.tracking.markdown import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger("lrsa_lit.tracking")

_made: weakref.WeakKeyDictionary[Trainer, Path] = weakref.WeakKeyDictionary()
"""The folders that were made for trainers without a logger."""


def loggers_of(trainer: Trainer) -> list[Logger]:
    """All loggers of a trainer, except the dummy logger of a ``fast_dev_run``."""
    return [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]


def others_of(trainer: Trainer) -> list[Logger]:
    """All loggers except MLflow's, on the first process; empty on other processes."""
    found = loggers_of(trainer) if trainer.is_global_zero else []
    return [logger for logger in found if not isinstance(logger, MLflowRun)]


def run_folder(trainer: Trainer) -> Path:
    """The folder for files of a trainer's run, on the first process.

    This is the folder of the first logger's run, where Lightning also puts checkpoints. Without a logger, the first
    call makes a new folder, such as ``test-1``.

    Raises:
        OSError: the new folder cannot be made.
    """
    root = Path(trainer.default_root_dir)
    if loggers := loggers_of(trainer):
        version = loggers[0].version
        named = version if isinstance(version, str) else f"version_{version}"
        return Path(loggers[0].save_dir or root, str(loggers[0].name), named)
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
    """Yield a path, then alternatives if it exists: ``answers-2.jsonl``, ``answers-3.jsonl`` and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def upload(trainer: Trainer, files: Sequence[Path], folder: str | None = None) -> None:
    """Upload files as artifacts of the MLflow run, in the background; the files themselves are kept."""
    if (logger := run_of(trainer)) is None:
        return
    for file in files:
        what = f"{folder}/{file.name}" if folder else file.name
        logger.deliver(what, logger.experiment.log_artifact, str(file), folder)


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Save a figure as ``pictures/NAME.png`` in the run's folder, replacing an earlier one, and log it.

    Raises:
        OSError: the file cannot be written.
    """
    file = run_folder(trainer) / PICTURES / f"{name}.png"
    write_atomically(file, lambda handle: figure.savefig(handle, format="png", dpi=120))
    upload(trainer, [file], PICTURES)
    show_figure(trainer, f"{PICTURES}/{name}", figure, file)


def show_figure(trainer: Trainer, name: str, figure: Figure, file: Path) -> None:
    """Pass a figure, saved in ``file``, to the loggers besides MLflow's that show images."""
    for logger in others_of(trainer):
        with harmless(f"{name} in {type(logger).__name__}"):
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [str(file)], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, trainer.global_step)


def show_table(trainer: Trainer, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Pass rows with the same columns to the loggers besides MLflow's that show tables."""
    titles, cells = list(rows[0]), [list(row.values()) for row in rows]
    for logger in others_of(trainer):
        with harmless(f"{name} in {type(logger).__name__}"):
            if isinstance(logger, WandbLogger):
                logger.log_table(name, columns=titles, data=cells, step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, markdown(titles, cells), trainer.global_step)


@contextlib.contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn any exception in a block that the run can do without into a warning."""
    try:
        yield
    except Exception as error:
        _log.warning("%s is missing: %s: %s", what, type(error).__name__, message_of(error))


def _command(trainer: Trainer) -> str:
    """The running command, taken from the command line's callback, because a fit may start with a validation."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    of_cli = [str(getattr(each, "command", "")) for each in callbacks if isinstance(each, SaveConfigCallback)]
    return of_cli[0] if of_cli else str(trainer.state.fn and trainer.state.fn.value)


def _new_folder(path: Path) -> Path:
    """Make the first folder of ``path-1``, ``path-2`` and so on that does not exist."""
    for number in itertools.count(1):
        folder = path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError
