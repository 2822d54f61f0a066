"""Several devices that share one model: FSDP2 as a strategy of Lightning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lrsa_lit.models.sharding import META, WEIGHTS, empty_weights, is_sharded_checkpoint, read_meta
from lrsa_lit.paths import put_in_place


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
        if self.is_global_zero:
            _write_meta(checkpoint, scratch / META)
            put_in_place(scratch, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What a checkpoint holds but its tensors; of the weights their shapes, for the module to check.

        Args:
            checkpoint_path: a sharded checkpoint, or a file that one device or DDP has written.
            weights_only: as torch has it; for files.
        """
        self._loading = Path(self.broadcast(checkpoint_path))
        if not is_sharded_checkpoint(self._loading):
            whole: dict[str, Any] = torch.load(
                self._loading, mmap=True, map_location="cpu", weights_only=weights_only is not False
            )
            return whole
        return {**read_meta(self._loading), WEIGHTS: empty_weights(self._loading), "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained weights, each process its parts."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        assert self.model is not None
        if is_sharded_checkpoint(self._loading):
            weights = self._weights()
            load({WEIGHTS: weights}, checkpoint_id=self._loading)
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
        from torch.distributed.checkpoint.state_dict_loader import load

        assert self.model is not None
        for index, optimizer in enumerate(self.optimizers):
            if is_sharded_checkpoint(self._loading):
                state = get_optimizer_state_dict(self.model, optimizer)
                load({_optimizer(index): state}, checkpoint_id=self._loading)
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

    def _by_name(self, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state with the weights' names in place of their numbers."""
        assert self.model is not None
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        held = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        groups = [{**group, "params": [held[number] for number in group["params"]]} for group in state["param_groups"]]
        return {"state": {held[number]: of for number, of in state["state"].items()}, "param_groups": groups}


def _optimizer(index: int) -> str:
    return f"optimizer_{index}"


def _write_meta(meta: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(meta, file)
        file.flush()
        os.fsync(file.fileno())
