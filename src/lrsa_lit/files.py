"""Files that appear under their names only when they are whole.

While a file is written it has a hidden name that ends in ``.partial``, and its writer has a lock on it: so others know
it from what a dead process has left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where what a dead process left stays.
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"


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
    _sync_names(path.parent)


def lock(file: IO[bytes]) -> bool:
    """Lock a file, if nobody else has; file systems without locks let everybody who has created it."""
    if fcntl is None:
        return "x" in file.mode
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return "x" in file.mode
    return True


def _sync_names(folder: Path) -> None:
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
