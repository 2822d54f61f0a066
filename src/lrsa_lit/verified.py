"""Seal folders with the size and SHA-256 of each file, and check them when they are opened."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrsa_lit.io import bring_to_disk, partial_folder, put_in_place, sha256_of, sync_names

SEAL = "seal.json"
"""The seal's file, which is written last: ``{"files": {name: {"size": bytes, "sha256": hex}}}``."""


def build(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a folder, which appears under its name only when it is complete, sealed and on the disk.

    An existing folder is replaced, unless it is sealed and undamaged, because then another process was first.

    Raises:
        OSError: writing failed, for example because the disk is full. An existing folder is unchanged, and no partial
            folder is left.
    """
    with partial_folder(folder) as partial:
        fill(partial)
        seal(partial)
        try:
            if not folder.exists():
                # This fails if another process was first; its folder, which may be in use by now, is kept.
                partial.rename(folder)
            elif damage(folder) is not None:
                put_in_place(partial, folder)
        except OSError:
            if damage(folder) is not None:
                raise
    sync_names(folder.parent)


def seal(folder: Path, digests: Mapping[str, str] | None = None) -> None:
    """Write a folder's :data:`SEAL` and sync the folder to the disk; ``digests`` are known ones, by relative path."""
    known = digests or {}
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": known.get(name) or sha256_of(folder / name)}
        for name in _names(folder)
    }
    (folder / SEAL).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    bring_to_disk(folder)


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a seal; folders from earlier versions do not."""
    return (folder / SEAL).is_file()


def damage(folder: Path) -> str | None:
    """What differs from the seal, in a few words; None if nothing does.

    Names and sizes are compared each time. Contents are compared once per process, and again if a file has changed
    since. Hidden files that the seal does not name are ignored, because systems create some (``.DS_Store``,
    ``.nfs0123``).
    """
    try:
        files = _sealed(folder)
        if odd := sorted(
            name for name in set(_names(folder)) ^ set(files) if name in files or Path(name).name[0] != "."
        ):
            return f"{odd[0]} is missing" if odd[0] in files else f"{odd[0]} does not belong there"
        for name, entry in files.items():
            if (size := (folder / name).stat().st_size) != entry["size"]:
                return f"{name} has {size:,} bytes instead of {entry['size']:,}"
        wrong = (
            name for name, entry in files.items() if _read(folder / name, *version(folder / name)) != entry["sha256"]
        )
        return next((f"{name} has changed since it was written" for name in wrong), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror or error})"


def _sealed(folder: Path) -> dict[str, dict[str, Any]]:
    """The files in the seal, sorted; an OSError if the seal is missing or damaged."""
    path = folder / SEAL
    try:
        files: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["files"]
        for entry in files.values():
            entry["size"] + 0, entry["sha256"] + ""
        return dict(sorted(files.items()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(None, "it is not a seal", str(path)) from error


def _names(folder: Path) -> list[str]:
    """The files of a folder as relative paths, including hidden ones, without the seal."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != SEAL)


def version(path: Path) -> tuple[int, ...]:
    """Numbers from the file system that change when a file changes."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(maxsize=4096)
def _read(path: Path, *version: int) -> str:
    """SHA-256 of one version of a file."""
    return sha256_of(path)
