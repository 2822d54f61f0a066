"""Checkpoints on the disk, read without trust: damage is noticed first, and no code in them runs.

A checkpoint is one file, or a folder of shards: ``*.distcp`` with the tensors, their :data:`INDEX`, :data:`META` with
all else, and a seal with the digests of these files.
"""

from __future__ import annotations

import functools
import logging
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrsa_lit import verified
from lrsa_lit.errors import UserError, message_of

SUFFIX = ".ckpt"
INDEX = ".metadata"
META = "meta.pt"

_BLOCK = 1 << 24
_TENSORS = "/data/"
"""In the names of the parts of a file that hold the bytes of tensors."""

_log = logging.getLogger(__name__)


class Unreadable(ValueError):  # noqa: N818 - what it is, not what to do
    """Why a file or folder is no checkpoint, or a truncated or damaged one; one line."""


def read(path: Path, *, tensors: bool = True, mapped: bool = True) -> dict[str, Any]:
    """What a checkpoint holds: of a file everything; of a folder all but its tensors.

    Args:
        path: a file, or a folder of shards.
        tensors: false checks all but the bytes of the tensors, for a quick look at many checkpoints.
        mapped: whether tensors stay on the disk until they are used.

    Raises:
        Unreadable: it is no checkpoint, or a damaged one.
    """
    import torch

    if (reason := damage(path, tensors=tensors)) is not None:
        raise Unreadable(reason)
    try:
        file = path / META if path.is_dir() else path
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # An unpickler fails in as many ways as a file can be made up.
        raise Unreadable(reason_of(error)) from error
    if not isinstance(content, dict):
        raise Unreadable(f"it holds a {type(content).__name__} and no dict")
    return content


def damage(path: Path, *, tensors: bool = True) -> str | None:
    """What is wrong with a file, or a folder of shards; None if nothing is.

    Every byte is read and compared with the checksums of the file, or the digests of the folder, once a process: some
    gigabytes a second, and it is in the system's memory when it is loaded thereafter. Folders of earlier versions hold
    no digests: of those only :data:`META` is read, and the log says so. ``tensors=False`` leaves out the bytes of the
    tensors.
    """
    try:
        file = path
        if path.is_dir():
            file = path / META
            if not holds_shards(path):
                return f"{INDEX} or {META} is missing"
            if tensors and verified.is_sealed(path):
                return verified.damage(path)
            if tensors:
                _say_unsealed(path)
        elif not path.is_file():
            return "it is no file" if path.exists() else "no such file"
        return _read_through(file, tensors, *verified.version(file))
    except (OSError, ValueError) as error:
        return reason_of(error)


def reason_of(error: BaseException) -> str:
    """What an error of a library says, short enough for a line."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return (message_of(error) or type(error).__name__)[:120]


def unusable(path: str | Path, reason: object) -> UserError:
    """What to say of a file or folder that cannot be read as a checkpoint."""
    return UserError("ckpt_path", reason=f"{path} is no checkpoint, or a truncated or damaged one ({reason})")


def complete_shards(folder: Path, content: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Add :data:`META` with the content to the tensors of a folder, and the seal; some digests are known by name."""
    import torch

    with (folder / META).open("wb") as file:
        torch.save(content, file)
    verified.seal(folder, digests)


def holds_shards(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint, complete as far as can be told without reading it."""
    return (path / META).is_file() and (path / INDEX).is_file()


@functools.lru_cache
def _say_unsealed(path: Path) -> None:
    _log.warning("%s was written without digests by an earlier version: its shards cannot be checked", path)


@functools.lru_cache
def _read_through(path: Path, tensors: bool, *version: int) -> str | None:
    """What is wrong with one version of a file."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # torch compresses nothing, and what says that it is compressed may unpack to any size.
                if entry.compress_type != zipfile.ZIP_STORED:
                    return f"{entry.filename} is compressed"
                if tensors or _TENSORS not in entry.filename:
                    with archive.open(entry) as file:
                        while file.read(_BLOCK):
                            pass
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        return message_of(error) or type(error).__name__
    return None
