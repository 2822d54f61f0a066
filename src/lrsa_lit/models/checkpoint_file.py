"""Read untrusted checkpoints from the disk: they are checked for damage first, and no code in them runs.

A checkpoint is one file, or a folder of shards: ``*.distcp`` with the tensors, their :data:`INDEX`, :data:`META` with
everything else, and a seal with the digests of these files.
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
"""A part of the names of archive entries that hold the bytes of tensors."""

_log = logging.getLogger(__name__)


class Unreadable(ValueError):  # noqa: N818 - what it is, not what to do
    """A file or folder is not a checkpoint, or is truncated or damaged; the message is one line."""


def read(path: Path, *, tensors: bool = True, mapped: bool = True) -> dict[str, Any]:
    """The contents of a checkpoint: everything in a file, or everything in a folder except its tensors.

    Args:
        path: a file, or a folder of shards.
        tensors: false skips the bytes of the tensors in the check, for a quick look at many checkpoints.
        mapped: whether tensors stay on the disk until they are used.

    Raises:
        Unreadable: it is not a checkpoint, or is damaged.
    """
    import torch

    if (reason := damage(path, tensors=tensors)) is not None:
        raise Unreadable(reason)
    try:
        file = path / META if path.is_dir() else path
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # Malformed files make the unpickler raise many kinds of exceptions.
        raise Unreadable(reason_of(error)) from error
    if not isinstance(content, dict):
        raise Unreadable(f"it holds a {type(content).__name__} instead of a dict")
    return content


def damage(path: Path, *, tensors: bool = True) -> str | None:
    """What is wrong with a file or a folder of shards; None if nothing is.

    All bytes are read and compared with the file's checksums or the folder's digests, once per process. This takes a
    second for some gigabytes and leaves the data in the page cache for loading. Folders of earlier versions have no
    digests, so only their :data:`META` is checked, and a warning is logged. ``tensors=False`` skips the bytes of the
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
            return "it is not a file" if path.exists() else "no such file"
        return _read_through(file, tensors, *verified.version(file))
    except (OSError, ValueError) as error:
        return reason_of(error)


def reason_of(error: BaseException) -> str:
    """A library's error message, shortened to fit a line."""
    if isinstance(error, OSError) and error.filename:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return (message_of(error) or type(error).__name__)[:120]


def unusable(path: str | Path, reason: object) -> UserError:
    """The error for a file or folder that cannot be read as a checkpoint."""
    return UserError("ckpt_path", reason=f"{path} is not a checkpoint, or is truncated or damaged ({reason})")


def complete_shards(folder: Path, content: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Add :data:`META` with ``content``, and the seal, to a folder of tensors; ``digests`` are those known already."""
    import torch

    with (folder / META).open("wb") as file:
        torch.save(content, file)
    verified.seal(folder, digests)


def holds_shards(path: Path) -> bool:
    """Whether a folder looks like a complete sharded checkpoint, without reading its files."""
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
                # torch never compresses, and a compressed entry could unpack to any size.
                if entry.compress_type != zipfile.ZIP_STORED:
                    return f"{entry.filename} is compressed"
                if tensors or _TENSORS not in entry.filename:
                    with archive.open(entry) as file:
                        while file.read(_BLOCK):
                            pass
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        return message_of(error) or type(error).__name__
    return None
