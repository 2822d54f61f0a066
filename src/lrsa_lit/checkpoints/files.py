"""Checkpoint files: written whole or not at all, checked before they are trusted, and found again.

A checkpoint is one file, or a folder of shards (``.metadata``, ``*.distcp``, ``meta.pt``), which a strategy writes.
While a file is written it has a hidden name that ends in ``.partial``, and its writer has a lock on it: so others know
it from what a dead process has left. A folder that is being replaced has a name that ends in ``.old``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where what a dead process left stays.
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".ckpt"
PARTIAL = ".partial"
REPLACED = ".old"
SHARDS_INDEX = ".metadata"
SHARDS_REST = "meta.pt"
"""What Lightning writes beside the shards, and after them."""

_BLOCK = 1 << 24


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that appears under its name only when it is whole and on the disk.

    Raises:
        OSError: the disk is full, for example. What was at ``path`` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)
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


def tidy(folder: Path) -> None:
    """Remove what processes that are gone have left half-written, and finish what they were replacing."""
    for partial in folder.glob(f".*{SUFFIX}.*{PARTIAL}"):
        # It may be gone by now: another process tidies as well.
        with contextlib.suppress(FileNotFoundError), partial.open("rb") as file:
            if _lock(file):
                partial.unlink()
    for replaced in folder.glob(f".*{SUFFIX}{REPLACED}"):
        path = replaced.with_name(replaced.name[1 : -len(REPLACED)])
        if path.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Of a file every byte is read and compared with the checksums that it holds: some gigabytes a second, and it is in
    the system's memory when it is loaded thereafter. Shards hold none: of a folder only the part that is written last
    is read.
    """
    if path.is_dir():
        if not (path / SHARDS_INDEX).is_file() or not (path / SHARDS_REST).is_file():
            return f"{SHARDS_INDEX} or {SHARDS_REST} is missing"
        path = path / SHARDS_REST
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while file.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints in these folders by the time they were written, the last one first."""
    paths = [path for folder in folders for path in folder.glob(f"*{SUFFIX}")]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


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
            if _lock(file) and os.fstat(file.fileno()).st_nlink:
                yield partial, file
                return


def _lock(file: IO[bytes]) -> bool:
    """Lock a file, if nobody else has; file systems without locks let everybody."""
    if fcntl is None:
        return "x" in file.mode
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return "x" in file.mode
    return True
