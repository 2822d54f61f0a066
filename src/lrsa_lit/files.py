"""Files and folders that appear under their names only when they are whole.

While one is written it has a hidden name that ends in ``.partial``, and its writer holds a lock on it. So another
process can tell it from what a dead process has left.
"""

from __future__ import annotations

import contextlib
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
_FOLDER = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that appears under its name only when it is whole and on the disk.

    Raises:
        OSError: the disk is full, for example. What was at ``path`` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path) as (partial, file):
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_names(path.parent)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new, empty, hidden folder beside ``target``, for its writer to fill and rename; what is not renamed is removed.

    Its mode is what the umask says. Folders beside it that dead processes left half-written are removed.

    Raises:
        OSError: the folder cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    partial, descriptor = _claimed_folder(target)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def bring_to_disk(folder: Path) -> None:
    """Wait until a folder, its files and its folders are on the disk: a rename must not arrive before them."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_names(Path(parent))


def lock(file: IO[bytes]) -> bool:
    """Lock a file, if nobody else has; file systems without locks let everybody who has created it."""
    return _lock(file.fileno(), created="x" in file.mode)


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


def sync_names(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file beside ``path``, locked for as long as this process has it open, and lives."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        with partial.open("xb") as file:
            # Between its creation and its lock, another process may have taken it for abandoned.
            if lock(file) and os.fstat(file.fileno()).st_nlink:
                yield partial, file
                return


def _claimed_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder beside ``target``, and the descriptor that keeps it locked."""
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
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


def remove_abandoned(parent: Path) -> None:
    """Remove the folders that dead processes have left half-written in a folder."""
    if fcntl is None:
        return
    for partial in parent.iterdir():
        if not _FOLDER.fullmatch(partial.name) or partial.is_symlink() or not partial.is_dir():
            continue
        # It may be gone by now, or somebody else's: then it stays.
        with contextlib.suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                if _lock(descriptor, created=False):
                    shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(descriptor)
