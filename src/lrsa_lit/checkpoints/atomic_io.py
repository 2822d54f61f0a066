"""Lightning's checkpoint files, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lrsa_lit.checkpoints.errors import CheckpointNotSaved, system_error
from lrsa_lit.checkpoints.files import tidy
from lrsa_lit.errors import UserError
from lrsa_lit.io import write_atomically
from lrsa_lit.models.checkpoint_file import Unreadable, read


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves under a temporary name, brings it to the disk and renames it; loads tensors and plain values only.

    It streams, where Lightning's own first makes a copy of the whole checkpoint in memory. What is not on a local disk
    is left to Lightning. Strategies that write folders of shards do not use it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointNotSaved: the disk is full, for example. What was at ``path`` before is still there.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return

        def write(file: IO[bytes]) -> None:
            torch.save(checkpoint, file)

        try:
            tidy(Path(path).parent)
            write_atomically(Path(path), write)
        except (OSError, RuntimeError) as error:
            if (cause := system_error(error)) is None:
                raise
            raise CheckpointNotSaved(f"checkpoint {path}: not saved ({cause.strerror})") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint after every byte of it was checked; code in it runs only where ``weights_only`` is false.

        Raises:
            UserError: it is damaged, or a folder of shards, which other strategies read.
        """
        if Path(path).is_dir():
            raise UserError(
                f"ckpt_path: {path} is a folder of shards; trainer.strategy must be FullySharded to read it"
            )
        if weights_only is False or not _is_local_file_protocol(path):
            only = True if weights_only is None else weights_only
            return super().load_checkpoint(path, map_location=map_location, weights_only=only)
        try:
            return read(Path(path), mapped=False)
        except Unreadable as error:
            raise UserError(f"ckpt_path: {path} is no checkpoint, or a truncated or damaged one ({error})") from error
