"""Several devices that share one model: FSDP2 as a strategy of Lightning."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lrsa_lit import verified
from lrsa_lit.errors import UserError
from lrsa_lit.io import put_in_place, sha256_of
from lrsa_lit.models.checkpoint_file import META, Unreadable, holds_shards, read
from lrsa_lit.models.shards import WEIGHTS, empty_weights, load_into


class FullySharded(ModelParallelStrategy):
    """Each device holds a part of the weights, gradients and optimizer state, and trains on batches of its own (FSDP2).

    Checkpoints are folders that any number of devices can load and ``lrsa export`` makes whole; they hold what is
    trained, which leaves a frozen base out. Lightning's own strategy would read the base back, too, and write in place.

    Args:
        process_group_backend: "nccl", "gloo" …; null takes what the devices need.
        timeout: how long a process waits for the others.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout)
        self._loading = Path()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for the optimizer's state after it has restored the weights."""
        return True

    def setup_environment(self) -> None:
        """All devices of all machines are one mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process' parts of the trained weights, on the CPU."""
        return self._weights(cpu_offload=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a sharded checkpoint beside its place and rename it there once it is complete.

        Raises:
            OSError: on all processes, if one of them cannot write; what was there before still is.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        path = Path(self.broadcast(filepath))
        scratch = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        self.barrier()
        tensors = {WEIGHTS: checkpoint.pop(WEIGHTS)}
        tensors |= {_optimizer(index): state for index, state in enumerate(checkpoint.pop("optimizer_states", []))}
        try:
            save(tensors, storage_writer=FileSystemWriter(scratch))
        except CheckpointException as error:
            if self.is_global_zero:
                shutil.rmtree(scratch, ignore_errors=True)
            # It is no Exception, and would pass by all who wait for one.
            raise OSError(f"{path} cannot be written ({next(iter(error.failures.values()))[0]})") from error
        digests = self._digests(scratch)
        if self.is_global_zero:
            with (scratch / META).open("wb") as file:
                torch.save(checkpoint, file)
            verified.seal(scratch, digests)
            put_in_place(scratch, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What a checkpoint holds but its tensors; of the weights their shapes, for the module to check.

        Args:
            checkpoint_path: a sharded checkpoint, or a file that one device or DDP has written.
            weights_only: of Lightning; whatever it is, no code in a checkpoint runs.

        Raises:
            UserError: it is no checkpoint, or a damaged one.
        """
        self._loading = Path(self.broadcast(checkpoint_path))
        with self._readable():
            # Every process would read all files to check them; the command has, before it started.
            content = read(self._loading, tensors=False)
            if not holds_shards(self._loading):
                return content
            return {**content, WEIGHTS: empty_weights(self._loading), "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained weights, each process its parts."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        assert self.model is not None
        if holds_shards(self._loading):
            weights = self._weights()
            with self._readable():
                load_into({WEIGHTS: weights}, self._loading)
            options = StateDictOptions(strict=strict)
        else:
            weights = checkpoint[WEIGHTS]
            options = StateDictOptions(strict=strict, full_state_dict=True)
        set_model_state_dict(self.model, weights, options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state, each process its parts."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        assert self.model is not None
        for index, optimizer in enumerate(self.optimizers):
            if holds_shards(self._loading):
                state = get_optimizer_state_dict(self.model, optimizer)
                with self._readable():
                    load_into({_optimizer(index): state}, self._loading)
                options = StateDictOptions()
            else:
                state = self._by_name(checkpoint["optimizer_states"][index], optimizer)
                options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)

    def _weights(self, *, cpu_offload: bool = False) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        assert self.model is not None
        assert self.lightning_module is not None
        # Where adapters alone are trained.
        partial = not self.lightning_module.strict_loading
        options = StateDictOptions(cpu_offload=cpu_offload, ignore_frozen_params=partial)
        return get_model_state_dict(self.model, options=options)

    def _digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of the shards of all processes, each of which has just written its own."""
        own = {path.name: sha256_of(path) for path in folder.glob(f"__{self.global_rank}_*")}
        if not torch.distributed.is_initialized():
            return own
        of_all: list[dict[str, str]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, own)
        return {name: digest for digests in of_all for name, digest in digests.items()}

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Make one line of what keeps the checkpoint from being read."""
        try:
            yield
        except Unreadable as error:
            raise UserError(
                f"ckpt_path: {self._loading} is no checkpoint, or a truncated or damaged one ({error})"
            ) from error

    def _by_name(self, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state with the weights' names in place of their numbers."""
        assert self.model is not None
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        held = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        groups = [{**group, "params": [held[number] for number in group["params"]]} for group in state["param_groups"]]
        return {"state": {held[number]: of for number, of in state["state"].items()}, "param_groups": groups}


def _optimizer(index: int) -> str:
    return f"optimizer_{index}"
