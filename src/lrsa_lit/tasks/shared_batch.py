"""Training batches whose rows several devices share: each gets the whole batch and reads only its own tokens.

Dimensions: B rows, T tokens per row, Tr tokens of a row on one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from lrsa_lit.attention import LAYOUT, Layout, LRSAConfig, packed_layout
from lrsa_lit.context_parallel import SharedRows, Shares, needs_all_keys, shortest_row
from lrsa_lit.data.collate import IGNORE_INDEX, TrainBatch
from lrsa_lit.errors import UserError
from lrsa_lit.objectives import Objective
from lrsa_lit.strategies import context_of

_BY_LENGTH = ("dynamic", "longrope")
"""Rotations of transformers that depend on the longest position of a call, which would differ between devices."""


def check_shareable(config: LRSAConfig | None, objective: Objective, model: Any) -> None:
    """Refuse settings that a device with only a part of the tokens cannot support.

    Args:
        config: the training attention; None means dense.
        objective: the training objective.
        model: the base model's config.

    Raises:
        UserError: the system, a term or the rotation needs the whole row.
    """
    if config is not None and config.system is not None:
        raise needs_all_keys(config.system)
    for term in objective.terms:
        if term.needs_rejected:
            raise UserError(
                "context", reason=f"{type(term).__name__} compares whole answers, which devices would share"
            )
    if kind := _rotation_by_length(getattr(model.get_text_config(), "rope_parameters", None)):
        raise UserError("context", reason=f"the model's rotary positions ({kind}) depend on the length of a row")


def _rotation_by_length(parameters: Any) -> str | None:
    """The kind of rotation, in any layers, that depends on the longest position of a call; None if there is none."""
    if not isinstance(parameters, dict):
        return None
    kind = parameters.get("rope_type")
    return kind if kind in _BY_LENGTH else next(filter(None, map(_rotation_by_length, parameters.values())), None)


def long_enough(batch: TrainBatch, mesh: DeviceMesh | None, config: LRSAConfig) -> TrainBatch:
    """The batch, with an additional packed sequence of padding if the last row of an epoch is too short to share."""
    if (group := context_of(mesh)) is None or batch["boundaries"] is None:
        return batch
    length = batch["boundaries"][-1]
    missing = shortest_row(group.size(), config.rule) - length
    if missing <= 0:
        return batch
    ids, labels, mask = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    return {
        **batch,
        "input_ids": pad(ids, (0, missing)),
        "labels": pad(labels, (0, missing), value=IGNORE_INDEX),
        "attention_mask": pad(mask, (0, missing), value=1),
        "boundaries": [*batch["boundaries"], length + missing],
    }


def shared_rows(batch: TrainBatch, mesh: DeviceMesh | None, config: LRSAConfig) -> SharedRows | None:
    """How the devices of a mesh share the rows of a batch; None if each device has its own batches.

    Raises:
        UserError: a row is shorter than two partitions for each device.
    """
    if (group := context_of(mesh)) is None:
        return None
    boundaries = batch["boundaries"] or [0, batch["input_ids"].shape[1]]
    return SharedRows(Shares.cut(boundaries, group.size(), config.rule), group)


def inputs_of(batch: TrainBatch, shared: SharedRows | None) -> dict[str, Any]:
    """The inputs of a model's forward for a batch, or for this device's part of its rows (B, Tr).

    There is no mask, because padding follows the tokens and attention is causal.
    """
    ids = batch["input_ids"]
    if shared is not None:
        return {
            "input_ids": shared.own(ids),
            "use_cache": False,
            "position_ids": shared.positions(ids.device),
            LAYOUT: Layout(shared=shared),
        }
    if batch["boundaries"] is None:
        return {"input_ids": ids, "use_cache": False}
    packed = {"position_ids": batch["position_ids"], LAYOUT: packed_layout(batch["boundaries"])}
    return {"input_ids": ids, "use_cache": False, **packed}


@torch.no_grad()
def added_up(sums: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sums added up over all devices that share rows, without waiting for a GPU."""
    if (group := context_of(mesh)) is None:
        return sums.detach()
    total = sums.detach().clone()
    distributed.all_reduce(total, group=group)
    return total
