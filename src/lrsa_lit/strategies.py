"""Lightning strategies: shard a model over devices (FSDP2), and run several processes per device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from lrsa_lit.attention import base_of
from lrsa_lit.errors import UserError
from lrsa_lit.io import partial_folder, put_in_place, sha256_of
from lrsa_lit.lightning_internals import OneMesh
from lrsa_lit.models.checkpoint_file import Unreadable, complete_shards, holds_shards, read, unusable
from lrsa_lit.models.shards import WEIGHTS, empty_weights, load_into

_OPTIMIZER = "optimizer_"
_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class FullySharded(OneMesh):
    """Each device holds a part of the weights, gradients and optimizer state, and trains on its own batches (FSDP2).

    Checkpoints are folders that any number of devices can load and that ``lrsa export`` converts to a whole model. They
    hold only trained weights, without a frozen base. Lightning's own strategy would also read the base back, and would
    write the checkpoint in place.

    Args:
        context: how many devices share each training batch, each with a part of the tokens of its rows (context
            parallelism). It must divide the number of devices. Evaluations are still divided by questions.

    Raises:
        UserError: ``context`` is less than 1 or, at the start of a run, does not divide the number of devices.

    Attributes:
        reads_shards: whether the strategy loads folders of shards.
        predicts: whether devices may get unequal shares of the data, as when every question is asked exactly once.
    """

    reads_shards = True
    predicts = False

    def __init__(self, context: int = 1) -> None:
        if context < 1:
            raise UserError("context", context, "an integer >= 1")
        super().__init__(tensor_parallel_size=1)
        self.context = context
        self._loading = Path()

    def check_devices(self) -> None:
        """Raise a UserError unless ``context`` divides the number of devices."""
        world = self.num_nodes * self.num_processes
        if world % self.context:
            field = "trainer.strategy.init_args.context"
            raise UserError(field, self.context, f"a divisor of {world}, the number of devices")

    def setup_environment(self) -> None:
        """Start the processes and create their mesh."""
        self.check_devices()
        super().setup_environment()

    @property
    def evaluation_sampler_kwargs(self) -> dict[str, Any]:
        """How evaluations are divided: over all devices, including those that share training batches."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True, so that Lightning restores the optimizer's state after the weights."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's parts of the trained weights, on the CPU."""
        return self._weights(cpu_offload=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a sharded checkpoint under a temporary name and rename it when it is complete.

        Raises:
            OSError: on all processes, if one of them cannot write; an existing checkpoint is unchanged.
        """
        path = Path(self.broadcast(filepath))
        tensors = {WEIGHTS: checkpoint.pop(WEIGHTS)}
        tensors |= {f"{_OPTIMIZER}{index}": state for index, state in enumerate(checkpoint.pop("optimizer_states", []))}
        with partial_folder(path) if self.is_global_zero else contextlib.nullcontext() as made:
            folder = Path(self.broadcast(made))  # type: ignore[arg-type]
            try:
                save(tensors, storage_writer=FileSystemWriter(folder))
            except CheckpointException as error:
                # CheckpointException is not a subclass of Exception, so callers would not catch it.
                raise OSError(f"{path} cannot be written ({next(iter(error.failures.values()))[0]})") from error
            # Each process hashes the files that it has just written.
            own = {file.name: sha256_of(file) for file in folder.glob(f"__{self.global_rank}_*")}
            digests = {name: digest for of_one in gathered(own) for name, digest in of_one.items()}
            failure = None
            if made is not None:
                try:
                    complete_shards(folder, checkpoint, digests)
                    put_in_place(folder, path)
                except OSError as error:
                    failure = error
            if (failure := self.broadcast(failure)) is not None:
                raise failure

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The contents of a checkpoint without its tensors, but with the weights' shapes, for the module to check.

        A checkpoint file of a single device or of DDP is read with its tensors. No code in a checkpoint runs, whatever
        ``weights_only`` is.

        Raises:
            UserError: it is not a checkpoint, or is damaged.
        """
        self._loading = Path(self.broadcast(checkpoint_path))
        with self._readable():
            # The bytes of tensors are not checked here, by every process: the command did it before it started.
            content = read(self._loading, tensors=False)
            if not holds_shards(self._loading):
                return content
            return {**content, WEIGHTS: empty_weights(self._loading), "optimizer_states": []}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained weights; each process loads its parts."""
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
        """Load the optimizer's state; each process loads its parts."""
        assert self.model is not None
        for index, optimizer in enumerate(self.optimizers):
            if holds_shards(self._loading):
                state = get_optimizer_state_dict(self.model, optimizer)
                with self._readable():
                    load_into({f"{_OPTIMIZER}{index}": state}, self._loading)
                options = StateDictOptions()
            else:
                state = self._by_name(checkpoint["optimizer_states"][index], optimizer)
                options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)

    def _weights(self, *, cpu_offload: bool = False) -> dict[str, Any]:
        assert self.model is not None
        assert self.lightning_module is not None
        # If only adapters are trained.
        partial = not self.lightning_module.strict_loading
        options = StateDictOptions(cpu_offload=cpu_offload, ignore_frozen_params=partial)
        return get_model_state_dict(self.model, options=options)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn reading errors into a UserError about the checkpoint."""
        try:
            yield
        except Unreadable as error:
            raise unusable(self._loading, error) from error

    def _by_name(self, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state with the weights' names instead of their indices."""
        assert self.model is not None
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        held = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
        groups = [{**group, "params": [held[number] for number in group["params"]]} for group in state["param_groups"]]
        return {"state": {held[number]: of for number, of in state["state"].items()}, "param_groups": groups}


class SharedDevice(DDPStrategy):
    """Several processes per device, for evaluation: with small batches, a GPU mostly waits for its process.

    The processes divide the questions, each with a copy of the model. Results are the same as with one process.

    Args:
        processes: number of processes on each of ``trainer.devices``, at least one.

    Attributes:
        trains: whether the strategy can be used for training.
    """

    trains = False

    def __init__(self, processes: int = 2) -> None:
        if processes < 1:
            raise UserError("processes", processes, "an integer >= 1")
        # NCCL does not support two processes on a device.
        super().__init__(process_group_backend="gloo")
        self._processes = processes

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device of each process."""
        return super().parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        shared = devices and [device for device in devices for _ in range(self._processes)]
        DDPStrategy.parallel_devices.fset(self, shared)  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """Start the processes, and divide the CPU cores among them."""
        super().setup_environment()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.num_processes))


CONTEXT = "context"
"""The name of the mesh dimension along which devices share the tokens of rows."""


def context_of(mesh: DeviceMesh | None) -> torch.distributed.ProcessGroup | None:
    """The group of devices that share this device's training batches; None if it does not share them."""
    if mesh is None or CONTEXT not in (mesh.mesh_dim_names or ()):
        return None
    return mesh.get_group(CONTEXT)


def sharing_devices(mesh: DeviceMesh | None) -> int:
    """How many devices share a training batch."""
    group = context_of(mesh)
    return 1 if group is None else group.size()


def whole_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The one-dimensional mesh over which weights are split: all devices, including those that share a batch."""
    if context_of(mesh) is None:
        return mesh["data_parallel"]
    return DeviceMesh(mesh.device_type, mesh.mesh.flatten(), mesh_dim_names=("data_parallel",))


def shard(model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None, layers_alone: bool = False) -> None:
    """Split a model's weights over the devices of a mesh, in place; each layer is gathered while it runs.

    Gradients are reduced in float32. Adapters and frozen weights, tied embeddings and gradient checkpointing work.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it, the same on each process.
        mesh: a one-dimensional mesh.
        dtype: dtype in which weights are gathered and used; the split weights keep theirs. None means their own dtype.
        layers_alone: split only the layers; embeddings, head and final norm stay whole on each device.

    Raises:
        UserError: the model does not declare its layers, or its weights are quantised to 4 bits.
    """
    base = base_of(model)
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError("strategy", type(base).__name__, reason="does not declare its layers; use ddp instead")
    if any(not weight.is_floating_point() for weight in base.parameters()):
        raise UserError("strategy", reason="quantized weights cannot be sharded; use ddp instead")
    # Inputs keep their dtype, because autocast chooses dtypes as on one device.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        # Without this, layers that have no sharded root above them would stay whole after their first use.
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if layers_alone:
        return
    # The root is the Hugging Face model, because generation bypasses peft's wrapper.
    module_of_class = type(base).__module__
    fully_shard(base, mesh=mesh, mp_policy=policy)
    # transformers reads the source of that module to learn whether the attention can be exchanged.
    type(base).__module__ = module_of_class


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to the model."""
    return isinstance(base_of(model), FSDPModule)


def gathered(value: Any) -> list[Any]:
    """The values of all processes by rank. Every process must call it; a process that is alone tells itself."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def shards_weights(strategy: object) -> bool:
    """Whether no device holds all weights."""
    return isinstance(strategy, _SHARDING)
