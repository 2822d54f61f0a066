"""Read the tensors of sharded checkpoints by ``torch.distributed.checkpoint``, without running code in their files.

Torch unpickles the index and non-tensor values without restrictions. Here the index may contain only the classes of
torch's metadata and only files in its folder, and other values are loaded as plain data.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lrsa_lit.models.checkpoint_file import INDEX, Unreadable, reason_of

WEIGHTS = "state_dict"
"""The name of the weights among the tensors of a sharded checkpoint."""

_ADMITTED: Mapping[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        *(getattr(metadata, name) for name in metadata.__all__),
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        set,
    )
} | {
    # Called by pickle for layouts, and for the path that a checkpoint was written to.
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): Path,
    ("pathlib", "WindowsPath"): Path,
    ("pathlib._local", "PosixPath"): Path,
    ("pathlib._local", "WindowsPath"): Path,
    ("collections", "OrderedDict"): dict,
}


def read_index(folder: Path) -> Metadata:
    """The index of a sharded checkpoint; Unreadable if it is damaged, holds code, or names files outside the folder."""
    try:
        with (folder / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        _check(index)
    except Exception as error:
        # Malformed files make the unpickler raise many kinds of exceptions.
        raise Unreadable(f"{INDEX}: {reason_of(error)}") from error
    return index  # type: ignore[no-any-return]


def empty_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a sharded checkpoint by name, with their shapes and dtypes but without data."""
    prefix = f"{WEIGHTS}."
    return {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in read_index(path).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a sharded checkpoint, whole, on the CPU. Raises as :func:`load_into`."""
    weights = {name: torch.empty_like(weight, device="cpu") for name, weight in empty_weights(path).items()}
    with warnings.catch_warnings():
        # Reading in a single process is intended.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load_into({WEIGHTS: weights}, path, no_dist=True)
    return weights


def load_into(tensors: dict[str, Any], path: Path, *, no_dist: bool = False) -> None:
    """Fill nested dicts with values of a sharded checkpoint; each process reads its parts. Unreadable if it fails."""
    try:
        load(tensors, storage_reader=_Reader(path), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:
        # CheckpointException is not a subclass of Exception, so callers would not catch it.
        cause = next(iter(error.failures.values()))[0]
        raise Unreadable(reason_of(cause)) from error


class _Unpickler(pickle.Unpickler):
    """Allows only the classes of torch's metadata."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout):
            return found
        if (admitted := _ADMITTED.get((module, name))) is None:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which no checkpoint needs")
        return admitted


class _Reader(FileSystemReader):
    """Torch's reader, but the index is read by :func:`read_index`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


class _Planner(DefaultLoadPlanner):
    """Torch's planner, but non-tensor values are loaded only as plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def _check(index: Any) -> None:
    """Raise a ValueError if it is not an index, or names a file outside its folder."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError("it is not an index of a checkpoint")
    for info in index.storage_data.values():
        name = info.relative_path
        if name in ("", "..") or name != Path(name).name:
            raise ValueError(f"it names the file {name!r}, which is not in the folder")
    for entry in index.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata) and not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError("it names a tensor without a dtype")
