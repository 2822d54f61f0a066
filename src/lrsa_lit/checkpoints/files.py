"""Checkpoint files: checked before they are trusted, found again, and tidied up after.

A checkpoint is one file, or a folder of shards (``.metadata``, ``*.distcp``, ``meta.pt``), which a strategy writes. A
folder that is being replaced has a name that ends in ``.old``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lrsa_lit.errors import said
from lrsa_lit.files import PARTIAL, lock

SUFFIX = ".ckpt"
REPLACED = ".old"
SHARDS_INDEX = ".metadata"
SHARDS_REST = "meta.pt"
"""What Lightning writes beside the shards, and after them."""

_BLOCK = 1 << 24


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
        return said(error) or type(error).__name__
    return None


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints in these folders by the time they were written, the last one first."""
    paths = [path for folder in folders for path in folder.glob(f"*{SUFFIX}")]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
