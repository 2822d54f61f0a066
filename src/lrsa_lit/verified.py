"""Folders that are sealed with the size and SHA-256 of each file, and checked when they are opened."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrsa_lit.io import bring_to_disk, partial_folder, put_in_place, sha256_of, sync_names

SEAL = "seal.json"
"""Holds ``{"files": {name: {"size": bytes, "sha256": hex}}}``; the last file that is written."""


def build(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a folder that appears under its name only when it is whole, sealed and on the disk.

    What bears the name already is replaced, unless it is sealed and undamaged: then another process was first.

    Raises:
        OSError: the disk is full, for example. What bore the name before still does, and nothing is left beside it.
    """
    with partial_folder(folder) as partial:
        fill(partial)
        seal(partial)
        try:
            if not folder.exists():
                # Fails where another process was first: its folder, which may be in use by now, stays.
                partial.rename(folder)
            elif damage(folder) is not None:
                put_in_place(partial, folder)
        except OSError:
            if damage(folder) is not None:
                raise
    sync_names(folder.parent)


def seal(folder: Path, digests: Mapping[str, str] | None = None) -> None:
    """Bring a folder to the disk and write its :data:`SEAL`; ``digests`` are those that are known, by path in it."""
    known = digests or {}
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": known.get(name) or sha256_of(folder / name)}
        for name in _names(folder)
    }
    (folder / SEAL).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    bring_to_disk(folder)


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a seal; folders of earlier versions have none."""
    return (folder / SEAL).is_file()


def damage(folder: Path) -> str | None:
    """What differs from the seal, in a few words; None if nothing does.

    Names and sizes are compared each time, contents once a process: again only where a file has changed since. Hidden
    files that the seal does not name are passed over: systems leave theirs, such as ``.DS_Store`` or ``.nfs0123``.
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
    """The files that the seal names, sorted; an OSError if there is no seal, or it is damaged itself."""
    path = folder / SEAL
    try:
        files: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["files"]
        for entry in files.values():
            entry["size"] + 0, entry["sha256"] + ""
        return dict(sorted(files.items()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(None, "it is no seal", str(path)) from error


def _names(folder: Path) -> list[str]:
    """The files of a folder, as paths within it; hidden ones too, but not the seal."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != SEAL)


def version(path: Path) -> tuple[int, ...]:
    """What changes when a file does, as far as the file system knows."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(maxsize=4096)
def _read(path: Path, *version: int) -> str:
    """SHA-256 of one version of a file."""
    return sha256_of(path)
