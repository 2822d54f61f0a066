"""Files and folders that appear under their names only when they are whole.

While one is written it has a hidden name that ends in ``.partial``, and its writer holds a lock on it. So another
process can tell it from what a dead process has left.
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
except ImportError:  # Windows, where what a dead process left stays.
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
REPLACED = ".old"
"""The end of the hidden name of a folder that is being replaced."""

_OURS = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that appears under its name only when it is whole and on the disk.

    Raises:
        OSError: the disk is full, for example. What was at ``path`` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        partial = _hidden(path)
        with partial.open("xb") as file:
            if not lock(file) or not os.fstat(file.fileno()).st_nlink:
                # Between its creation and its lock, another process has taken it for abandoned.
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
    """A new, empty, hidden folder beside ``target``, for its writer to fill and rename; what is not renamed is removed.

    Its mode is what the umask says. What dead processes left half-written beside it is removed.
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
    """Give a complete folder its final name, in place of what bears it now; both are on one file system.

    A folder that is not empty cannot be renamed over, so for a moment there is none of that name.
    """
    old = target.with_name(f".{target.name}{REPLACED}")
    _remove(old)
    if target.exists():
        target.rename(old)
    complete.rename(target)
    _remove(old)


def is_unfinished(path: Path) -> bool:
    """Whether a path has the hidden name of what is being written or replaced, or was when its writer died."""
    return bool(_OURS.fullmatch(path.name)) or (path.name.startswith(".") and path.name.endswith(REPLACED))


def remove(path: Path) -> None:
    """Remove a file or a folder, which loses its name first: nobody sees a part of it under that name.

    Raises:
        OSError: it is not there, or may not be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    hidden = _hidden(path)
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_abandoned(parent: Path) -> None:
    """Remove the files and folders that dead processes have left half-written in a folder."""
    if fcntl is None:
        return
    for partial in parent.iterdir():
        if not _OURS.fullmatch(partial.name) or partial.is_symlink():
            continue
        # It may be gone by now, or somebody else's: then it stays.
        with contextlib.suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                if _lock(descriptor, created=False):
                    _remove(partial)
            finally:
                os.close(descriptor)


def bring_to_disk(folder: Path) -> None:
    """Wait until a folder, its files and its folders are on the disk: a rename must not arrive before them."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_names(Path(parent))


def sync_names(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
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
    """Lock a file, if nobody else has; file systems without locks say ``otherwise``, None being whether it is new."""
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
        # Not tempfile.mkdtemp: nobody else could read what comes of it.
        partial.mkdir()
        if fcntl is None:
            return partial, None
        # Between its creation and its lock, another process may have taken it for abandoned.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            if _lock(descriptor, created=True) and partial.is_dir():
                return partial, descriptor
            os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
