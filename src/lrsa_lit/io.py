"""Write files and folders so that they appear under their names only when they are complete.

Until then they have a hidden name that ends in ``.partial``, and their writer holds a lock. So other processes can
distinguish them from the remains of dead processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where the remains of dead processes are not removed.
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
REPLACED = ".old"
"""The suffix of the hidden name of a folder that is being replaced."""

_OURS = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file, which appears under its name only when it is complete and on the disk.

    Raises:
        OSError: writing failed, for example because the disk is full. An existing file at ``path`` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        partial = _hidden(path)
        with partial.open("xb") as file:
            if not lock(file) or not os.fstat(file.fileno()).st_nlink:
                # Before the lock, another process has removed the file as abandoned.
                continue
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        return sync_names(path.parent)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new hidden folder next to ``target``, for the caller to fill and rename; otherwise it is removed.

    Its mode follows the umask. Half-written files of dead processes next to it are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    partial, descriptor = _locked_folder(target)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def put_in_place(complete: Path, target: Path) -> None:
    """Rename a complete folder to its final name, replacing what is there; both must be on the same file system.

    A non-empty folder cannot be renamed over, so for a moment nothing has that name.
    """
    old = target.with_name(f".{target.name}{REPLACED}")
    _remove(old)
    if target.exists():
        target.rename(old)
    complete.rename(target)
    _remove(old)


def is_unfinished(path: Path) -> bool:
    """Whether a path has the hidden name of a file or folder that is, or was, being written or replaced."""
    return bool(_OURS.fullmatch(path.name)) or (path.name.startswith(".") and path.name.endswith(REPLACED))


def remove(path: Path) -> None:
    """Remove a file or a folder. A folder is renamed first, so that no process sees a part of it under its name.

    Raises:
        OSError: it does not exist or cannot be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    hidden = _hidden(path)
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_abandoned(parent: Path) -> None:
    """Remove half-written files and folders of dead processes from a folder."""
    if fcntl is None:
        return
    for partial in parent.iterdir():
        if not _OURS.fullmatch(partial.name) or partial.is_symlink():
            continue
        # Files that are gone by now or belong to another user are left alone.
        with contextlib.suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                if _lock(descriptor, created=False):
                    _remove(partial)
            finally:
                os.close(descriptor)


def bring_to_disk(folder: Path) -> None:
    """Sync a folder with all its files and folders to the disk, so that a later rename cannot get there first."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_names(Path(parent))


def sync_names(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file: IO[bytes], *, otherwise: bool | None = None) -> bool:
    """Lock a file; false if another process has locked it.

    On file systems without locks the result is ``otherwise``; None means whether the file was just created.
    """
    return _lock(file.fileno(), created="x" in file.mode if otherwise is None else otherwise)


def _lock(descriptor: int, *, created: bool) -> bool:
    if fcntl is None:
        return created
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return created
    return True


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder beside ``target``, and the descriptor that keeps it locked."""
    while True:
        partial = _hidden(target)
        # Not tempfile.mkdtemp, whose folders other users cannot read.
        partial.mkdir()
        if fcntl is None:
            return partial, None
        # Before the lock, another process may have removed it as abandoned.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            if _lock(descriptor, created=True) and partial.is_dir():
                return partial, descriptor
            os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
