"""Checkpoints in their folder: found again, and tidied up after. One that is being replaced ends in ``.old``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import IO

from lrsa_lit.io import PARTIAL, lock
from lrsa_lit.models.checkpoint_file import SUFFIX

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

REPLACED = ".old"

_claimed: dict[Path, IO[bytes]] = {}


def claim(folder: Path) -> bool:
    """Claim a run's checkpoints until :func:`release`, or until this process ends, however it does.

    The claim is a lock of this process alone: those that it starts, such as workers of a data loader, do not keep it.

    Returns:
        False where another process has them. File systems without locks let everybody.
    """
    path = _lock_of(folder)
    if fcntl is None or path in _claimed:
        # Another look at a file of this process would end the lock when it is closed.
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
    for partial in folder.glob(f".*{SUFFIX}.*{PARTIAL}"):
        # It may be gone by now: another process tidies as well.
        with contextlib.suppress(FileNotFoundError), partial.open("rb") as file:
            if lock(file):
                partial.unlink()
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
