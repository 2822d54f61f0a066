"""Checkpoint files: write them completely or not at all, claim their folder while a run writes, and list them."""

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
    """A checkpoint could not be written; the files of earlier ones are unchanged."""


class NonFiniteLoss(UserError):  # noqa: N818
    """The loss or a weight is NaN or infinite; nothing was saved since."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves under a temporary name, syncs to the disk and renames; loads only tensors and plain values.

    It writes directly to the file, whereas Lightning first copies the whole checkpoint in memory. Paths that are not on
    a local disk are left to Lightning. Strategies that write folders of shards do not use it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; CheckpointNotSaved if it fails (a full disk, say), and the previous file is kept."""
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
        """Check all bytes of a checkpoint and read it; code in it runs only if ``weights_only`` is false.

        Raises:
            UserError: it is damaged, or is a folder of shards, which other strategies read.
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
    """The OSError in an error's chain of causes, or None: torch's writers wrap errors such as a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def claim(folder: Path) -> bool:
    """Claim a run's checkpoints until :func:`release` or the end of this process; false if another process has them.

    The claim is a lock of this process only; its child processes, such as data-loader workers, do not hold it. On file
    systems without locks, every claim succeeds.
    """
    path = _lock_of(folder)
    if fcntl is None or path in _claimed:
        # Opening and closing the file again would release this process's lock.
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError:
        # Other checks report a folder that is not writable.
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    _claimed[path] = file
    return True


def release(folder: Path) -> None:
    """Release a run's checkpoints, so that other processes can resume from them."""
    if (file := _claimed.pop(_lock_of(folder), None)) is not None:
        file.close()


def _lock_of(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def tidy(folder: Path) -> None:
    """Remove half-written files of dead processes, and finish replacements that they had started."""
    if folder.is_dir():
        remove_abandoned(folder)
    for replaced in folder.glob(f".*{SUFFIX}{REPLACED}"):
        path = replaced.with_name(replaced.name[1 : -len(REPLACED)])
        if path.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, path)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by modification time, the newest first."""
    # Links may be broken.
    paths = [path for path in folder.glob(f"*{SUFFIX}") if path.exists()]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
