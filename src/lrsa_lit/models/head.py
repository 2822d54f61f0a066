"""The loss of a causal language model at chosen positions, without ever holding their logits all at once.

Dimensions: B examples, T tokens, N positions of each that get a target, D width of the model, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROWS = 1024
"""Positions whose logits exist at a time, where no fused kernel does the work; it is not asked for fewer than that."""

# What models do to logits behind their head, by the name in their configuration, and the value that leaves them alone.
_AFTERWARDS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}

_log = logging.getLogger(__name__)


def summed_loss(model: Any, targets: Tensor, columns: Tensor, **inputs: Any) -> Tensor:
    """Sum of the cross-entropies of a model's next tokens, to train with.

    The hidden states at ``columns`` alone reach the head, and there they become the loss at once. A model that changes
    its logits behind the head (a scale, a soft cap) or whose head is no plain linear layer makes them, in float32.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it.
        targets: (B, N) int64, the tokens to predict; -100 where there is none.
        columns: (N,) int64, the positions that predict them, on the model's device.
        **inputs: what else the model's forward takes.

    Returns:
        float32, no dimensions.
    """

    def lose(hidden: Tensor, head: nn.Linear) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets.flatten()).reshape(1, 1, 1)

    if (loss := _in_place_of_logits(model, lose, columns, **inputs)) is not None:
        return loss.squeeze()
    logits = model(**inputs, logits_to_keep=columns).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def losses_of_rows(model: Any, targets: Tensor, columns: Tensor, **inputs: Any) -> Tensor:
    """As :func:`summed_loss`, but by row (B,) float64, to evaluate with."""

    def lose(hidden: Tensor, head: nn.Linear) -> Tensor:
        parts = zip(hidden.flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True)
        losses = [_cross_entropy(rows, head.weight, head.bias, wanted, "none") for rows, wanted in parts]
        return torch.cat(losses).reshape(*targets.shape, 1)

    losses = _in_place_of_logits(model, lose, columns, **inputs)
    if losses is None:
        logits = model(**inputs, logits_to_keep=columns).logits.float()
        losses = nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return losses.reshape(targets.shape).double().sum(dim=1)


def _in_place_of_logits(
    model: Any, lose: Callable[[Tensor, nn.Linear], Tensor], columns: Tensor, **inputs: Any
) -> Tensor | None:
    """What ``lose`` makes of the hidden states (B, N, D) and the head; None where the logits are not the head's alone.

    It runs inside of the model's own forward: only there are sharded weights whole.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    changes = any(getattr(config, name, neutral) not in (None, neutral) for name, neutral in _AFTERWARDS.items())
    if changes or not isinstance(head, nn.Linear):
        return None
    head.forward = lambda hidden: lose(hidden, head)  # type: ignore[method-assign, assignment]
    try:
        found: Tensor = model(**inputs, logits_to_keep=columns).logits
    finally:
        del head.forward
    return found


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum (float32) of the cross-entropies of ``hidden @ weight.T + bias``, by liger-kernel on a GPU, else by pieces.

    The fused kernel waits for the GPU once, to count the targets. Few positions are not worth that. Shapes: hidden
    (B N, D), weight (V, D), bias (V,), targets (B N,) int64 with -100 where there is none.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if device == "cuda" and len(targets) > ROWS and _has_liger():
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, bias, reduction="sum")
            return loss.float()
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            # Computed again in the backward pass: B N x V numbers are what must not be kept.
            total = total + checkpoint(_cross_entropy, rows, weight, bias, wanted, "sum", use_reentrant=False)
        return total


def _cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return nn.functional.cross_entropy(logits, targets, reduction=reduction)


@functools.cache
def _has_liger() -> bool:
    if importlib.util.find_spec("liger_kernel"):
        return True
    _log.info("liger-kernel is not installed: the loss takes %d positions at a time instead", ROWS)
    return False
