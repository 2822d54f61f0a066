"""Checkpoints in their folder: found again, and tidied up after. One that is being replaced ends in ``.old``."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lrsa_lit.files import PARTIAL, lock

SUFFIX = ".ckpt"
REPLACED = ".old"


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
