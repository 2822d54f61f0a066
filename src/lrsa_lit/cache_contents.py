"""List and remove the entries of the project's cache: converted models, tokenised data, ….

This module must import quickly.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrsa_lit import io
from lrsa_lit.paths import cache_dir

KINDS = {
    "models": "GGUF files converted for transformers; converted again when they are needed",
    "data": "tokenised examples; made again when they are needed, if their source files still exist",
    "teachers": "outputs of teachers for training data; only `lrsa distil-cache` makes them again",
    "sources": "digests of source files",
    "hub": "downloads of the library datasets",
    "unfinished": "half-written files of killed processes",
    "other": "not written by this version of lrsa",
}
"""The kinds of entries, and whether they are made again."""

REMADE = ("models", "data", "sources", "hub", "unfinished")
"""Kinds that can be removed without loss, because they are made again when needed or are useless."""

_TEACHERS = "teachers"
SOURCES = ".sources.json"
"""The end of the names of records of source files."""


@dataclass(frozen=True)
class Entry:
    """A part of the cache that can be removed without affecting the others.

    Attributes:
        kind: one of :data:`KINDS`.
        name: its path within the cache folder, by which users name it.
        paths: its files and folders.
        size: bytes on the disk.
        made: the latest modification time of its files, in seconds since 1970.
    """

    kind: str
    name: str
    paths: tuple[Path, ...]
    size: int
    made: float


def entries() -> list[Entry]:
    """All entries of the cache, sorted by kind; unreadable ones and those that disappear meanwhile are left out."""
    root = cache_dir()
    found = [entry for path in _children(root) for entry in _within(root, path)]
    return sorted(found, key=lambda entry: ([*KINDS].index(entry.kind), entry.name))


def remove(entry: Entry) -> None:
    """Remove an entry. It is renamed first, so that no process mistakes a half-removed folder for a complete one.

    Files that a living process is writing are kept, and processes that have opened files can still read them.

    Raises:
        OSError: the entry cannot be removed.
    """
    for path in entry.paths:
        if path.name.endswith(io.PARTIAL):
            io.remove_abandoned(path.parent)
        else:
            with contextlib.suppress(FileNotFoundError):
                io.remove(path)
        # A fingerprint's folder is removed with the last of its splits and teachers.
        for parent in path.parents[:2]:
            if cache_dir("data") in parent.parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def size_of(path: Path) -> int:
    """Bytes of a file or folder on the disk; links are not followed."""
    return sum(_on_disk(each) for each in _files(path))


def _within(root: Path, path: Path) -> Iterator[Entry]:
    name = path.name
    if name == "models" and path.is_dir():
        yield from (_entry(root, "models", child) for child in _finished(path))
        yield from _unfinished(root, path)
    elif name == "data" and path.is_dir():
        yield from _of_data(root, path)
    elif name == "hub" and path.is_dir():
        yield _entry(root, "hub", path)
    else:
        yield _entry(root, "other", path)


def _of_data(root: Path, folder: Path) -> Iterator[Entry]:
    digests = []
    for path in _finished(folder):
        if not path.is_dir():
            if path.name.endswith(SOURCES):
                digests.append(path)
            else:
                yield _entry(root, "other", path)
            continue
        splits = [child for child in _finished(path) if child.name != _TEACHERS]
        if splits or not _children(path):
            yield _entry(root, "data", *(splits or [path]), name=path)
        yield from _unfinished(root, path)
        for each in _finished(path / _TEACHERS):
            yield _entry(root, _TEACHERS, each)
        yield from _unfinished(root, path / _TEACHERS)
    if digests:
        yield _entry(root, "sources", *digests, name=folder / f"*{SOURCES}")
    yield from _unfinished(root, folder)


def _finished(folder: Path) -> list[Path]:
    return [path for path in _children(folder) if not io.is_unfinished(path)]


def _unfinished(root: Path, folder: Path) -> Iterator[Entry]:
    yield from (_entry(root, "unfinished", path) for path in _children(folder) if io.is_unfinished(path))


def _children(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _entry(root: Path, kind: str, *paths: Path, name: Path | None = None) -> Entry:
    files = [file for path in paths for file in _files(path)]
    made = max((_modified(path) for path in (*paths, *files)), default=0.0)
    shown = (name or paths[0]).relative_to(root).as_posix()
    return Entry(kind, shown, paths, sum(map(_on_disk, files)), made)


def _files(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for parent, _, names in os.walk(path):
        yield from (Path(parent, name) for name in names)


def _on_disk(path: Path) -> int:
    with contextlib.suppress(OSError):
        about = path.lstat()
        # Windows does not report blocks.
        return getattr(about, "st_blocks", -(-about.st_size // 512)) * 512
    return 0


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


def free_space(path: Path) -> int | None:
    """Free bytes on the file system of a path, which need not exist; None if unknown."""
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    with contextlib.suppress(OSError):
        return shutil.disk_usage(there).free
    return None
