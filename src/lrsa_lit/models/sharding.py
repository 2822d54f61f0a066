"""Models whose weights are split over several devices (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lrsa_lit.attention import base_of
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
        raise UserError("strategy", type(base).__name__, reason="does not say what its layers are; use ddp instead")
    if any(not weight.is_floating_point() for weight in base.parameters()):
        raise UserError("strategy", reason="quantized weights cannot be sharded; use ddp instead")
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
