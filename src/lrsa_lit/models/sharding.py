"""Models whose weights are split over several devices (FSDP2), and the checkpoints that they leave.

A sharded checkpoint is a folder: files of ``torch.distributed.checkpoint`` with the weights and the optimizer, and
:data:`META` with all else, as Lightning's ModelParallelStrategy lays it out.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrsa_lit.attention.rules import base_of
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

META = "meta.pt"
WEIGHTS = "state_dict"
"""Under this name the weights stand among the tensors of a sharded checkpoint."""


def shard(model: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Split a model's weights over the devices of a mesh, in place; each layer is gathered while it runs.

    Gradients are reduced in float32. Adapters and frozen weights, tied embeddings and gradient checkpointing work.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it, the same on each process.
        mesh: of one dimension.
        dtype: weights are gathered and used in it while the split ones stay in theirs; None: in theirs.

    Raises:
        UserError: the model does not say what its layers are, or its weights are packed in 4 bits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    base = base_of(model)
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"trainer.strategy: {type(base).__name__} does not say what its layers are; use ddp instead")
    if any(not weight.is_floating_point() for weight in base.parameters()):
        raise UserError("trainer.strategy: weights of model.backbone.quantization cannot be sharded; use ddp instead")
    # Inputs keep their dtype: autocast decides what runs in which, as on one device.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The Hugging Face model is the root and not peft's wrapper: that one is left out when it generates.
    module_of_class = type(base).__module__
    fully_shard(base, mesh=mesh, mp_policy=policy)
    # transformers reads the source of that module to learn whether the attention can be exchanged.
    type(base).__module__ = module_of_class


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(base_of(model), FSDPModule)


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint, complete as far as can be told without reading it."""
    return (path / META).is_file() and (path / ".metadata").is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds but its tensors."""
    meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=True)
    return meta


def empty_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a sharded checkpoint by name, with their shapes and dtypes but without data."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    prefix = f"{WEIGHTS}."
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a sharded checkpoint, whole, on the CPU; any number of processes may have written it.

    Raises:
        OSError: a part of it is missing or cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    weights = {name: torch.empty_like(weight, device="cpu") for name, weight in empty_weights(path).items()}
    try:
        with warnings.catch_warnings():
            # That no other process takes part is what is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load({WEIGHTS: weights}, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        # It is no Exception, and would pass by all who wait for one.
        raise OSError(str(next(iter(error.failures.values()))[0])) from error
    return weights
