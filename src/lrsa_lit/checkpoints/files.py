"""Checkpoints in their folder: found again, and tidied up after. One that is being replaced ends in ``.old``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from lrsa_lit.files import PARTIAL, lock

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".ckpt"
REPLACED = ".old"

_claimed: dict[Path, IO[bytes]] = {}


def claim(folder: Path) -> bool:
    """Claim a run's checkpoints for as long as this process lives, however it ends.

    The claim is a lock of this process alone: those that it starts, such as workers of a data loader, do not keep it.

    Returns:
        False where another process has them. File systems without locks let everybody.
    """
    path = folder.resolve().with_name(f".{folder.resolve().name}.lock")
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


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints in these folders by the time they were written, the last one first."""
    # A link may lead nowhere.
    paths = [path for folder in folders for path in folder.glob(f"*{SUFFIX}") if path.exists()]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
