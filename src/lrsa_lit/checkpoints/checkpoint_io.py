"""Checkpoints in their folder: written whole or not at all, claimed by the run that writes them, found again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lrsa_lit.errors import UserError
from lrsa_lit.io import REPLACED, remove_abandoned, write_atomically
from lrsa_lit.lightning_internals import is_local
from lrsa_lit.models.checkpoint_file import SUFFIX, Unreadable, read, unusable

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

_claimed: dict[Path, IO[bytes]] = {}


class CheckpointNotSaved(UserError):  # noqa: N818 - what happened, as with KeyboardInterrupt
    """A checkpoint could not be written; the files of earlier ones are as they were."""


class NonFiniteLoss(UserError):  # noqa: N818
    """The loss, or a weight, is NaN or infinite; nothing was saved since."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves under a temporary name, brings it to the disk and renames it; loads tensors and plain values only.

    It streams, where Lightning's own first makes a copy of the whole checkpoint in memory. What is not on a local disk
    is left to Lightning. Strategies that write folders of shards do not use it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; CheckpointNotSaved if the disk is full, for example, and what was there before stays."""
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            tidy(Path(path).parent)
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            if (cause := system_error(error)) is None:
                raise
            raise CheckpointNotSaved(f"checkpoint {path}: not saved ({cause.strerror})") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint after every byte of it was checked; code in it runs only where ``weights_only`` is false.

        A UserError if it is damaged, or a folder of shards, which other strategies read.
        """
        if Path(path).is_dir():
            hint = "trainer.strategy must be FullySharded to read it"
            raise UserError("ckpt_path", str(path), reason="is a folder of shards", hint=hint)
        if weights_only is False or not is_local(path):
            return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only is not False)
        try:
            return read(Path(path), mapped=False)
        except Unreadable as error:
            raise unusable(path, error) from error


def system_error(error: BaseException | None) -> OSError | None:
    """The OSError among what led to an error: torch's writers raise errors of their own over a full disk's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def claim(folder: Path) -> bool:
    """Claim a run's checkpoints until :func:`release`, or until this process ends; false if another process has them.

    The claim is a lock of this process alone: those that it starts, such as workers of a data loader, do not keep it.
    File systems without locks let everybody.
    """
    path = _lock_of(folder)
    if fcntl is None or path in _claimed:
        # To open and close the file once more would end this process's lock.
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError:
        # Who cannot write here is told so elsewhere.
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    _claimed[path] = file
    return True


def release(folder: Path) -> None:
    """Let other processes go on from a run's checkpoints."""
    if (file := _claimed.pop(_lock_of(folder), None)) is not None:
        file.close()


def _lock_of(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def tidy(folder: Path) -> None:
    """Remove what processes that are gone have left half-written, and finish what they were replacing."""
    if folder.is_dir():
        remove_abandoned(folder)
    for replaced in folder.glob(f".*{SUFFIX}{REPLACED}"):
        path = replaced.with_name(replaced.name[1 : -len(REPLACED)])
        if path.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, path)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by the time they were written, the last one first."""
    # A link may lead nowhere.
    paths = [path for path in folder.glob(f"*{SUFFIX}") if path.exists()]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
