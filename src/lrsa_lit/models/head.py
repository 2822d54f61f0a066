"""Losses and logits at the output head of a causal language model, without ever holding all logits at once.

Dimensions: B examples, T tokens, N positions per example, M positions in all, D width of the model, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

ROWS = 1024
"""The most positions whose logits exist at a time."""

LOGITS = 1 << 25
"""The most logits at a time. A loss holds several float32 tensors of this size. With a vocabulary of 128k, 1,024 rows
would take half a gigabyte each."""

RowsLoss = Callable[..., Tensor]
"""A loss summed over rows, from logits (rows, V) and further tensors with as many rows."""

_AFTERWARDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, divisor: logits / divisor,
}
"""What models do to logits after the head, by the setting in their config; 1.0 and None change nothing."""

_log = logging.getLogger(__name__)


class Head:
    """An output head that computes logits for some rows at a time. Create and use it inside the model's forward.

    Args:
        layer: the model's output layer; None if the rows are logits already.
        config: the text model's config, which says what happens to logits afterwards.
    """

    def __init__(self, layer: nn.Linear | None = None, config: Any = None) -> None:
        self.weight: Tensor | None = None if layer is None else layer.weight
        self.bias: Tensor | None = None if layer is None else layer.bias
        values = {name: getattr(config, name, None) for name in _AFTERWARDS}
        self._afterwards = {name: value for name, value in values.items() if value not in (None, 1.0)}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (M, V), at least float32, of hidden states (M, D)."""
        hidden, weight, bias = self._operands(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._changed(hidden if weight is None else linear(hidden, weight, bias))

    def as_autocast(self) -> Head:
        """This head with its weights converted once to autocast's dtype for linear layers, for many calls."""
        device = "cpu" if self.weight is None else self.weight.device.type
        if self.weight is None or not torch.is_autocast_enabled(device):
            return self
        head, dtype = copy.copy(self), torch.get_autocast_dtype(device)
        head.weight = self.weight.to(dtype)
        head.bias = None if self.bias is None else self.bias.to(dtype)
        return head

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy (M,) of each row, computed piece by piece, without gradients.

        Args:
            hidden: (M, D).
            targets: (M,) int64, -100 for rows without a target.
        """
        head = self.as_autocast()
        parts = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([cross_entropy(head.logits(rows), wanted, reduction="none") for rows, wanted in parts])

    def summed(self, loss: RowsLoss, hidden: Tensor, *others: Tensor) -> Tensor:
        """The sum of a loss over all rows, at most ``ROWS`` at a time, in the forward and in the backward pass.

        Args:
            loss: called with logits (R, V) and R rows of each of the others; only the logits get a gradient.
            hidden: (M, D).
            others: further tensors with M rows.

        Returns:
            A scalar, at least float32.
        """
        hidden, weight, bias = self._operands(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            total: Tensor = _PieceByPiece.apply(self, loss, hidden, weight, bias, *others)
        return total

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the cross-entropies, by liger-kernel's fused kernel on a GPU, else piece by piece.

        The fused kernel waits for the GPU once, to count the targets, so it is not used for few positions.

        Args:
            hidden: (M, D).
            targets: (M,) int64, -100 for rows without a target.
        """
        head = self.as_autocast()
        on_gpu = hidden.device.type == "cuda" and len(targets) > ROWS
        # In float16 its gradients would underflow, because the gradient scaler has not scaled them yet.
        fusible = head.weight is not None and head.weight.dtype != torch.float16 and not self.changes_logits
        if not (on_gpu and fusible and _has_liger()):
            return head.summed(lambda logits, wanted: cross_entropy(logits, wanted, reduction="sum"), hidden, targets)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        hidden, weight, bias = head._operands(hidden)
        with torch.autocast("cuda", enabled=False):
            loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, targets, bias, reduction="sum")
        return loss.float()

    @property
    def changes_logits(self) -> bool:
        """Whether the model changes logits after the layer."""
        return bool(self._afterwards)

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Input, weight and bias of the layer, in one dtype."""
        head = self.as_autocast()
        return hidden if head.weight is None else hidden.to(head.weight.dtype), head.weight, head.bias

    def _changed(self, logits: Tensor) -> Tensor:
        logits = _precise(logits)
        for name, value in self._afterwards.items():
            logits = _AFTERWARDS[name](logits, value)
        return logits


def at_head(
    model: Any, compute: Callable[[Tensor, Head], Tensor], columns: Tensor | None = None, **inputs: Any
) -> Tensor:
    """Run a model, but replace its output head by ``compute``.

    ``compute`` runs inside the model's forward, because only there are sharded weights whole. If the head is not a
    plain linear layer, the model computes the logits itself.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it.
        compute: takes the hidden states (B, N, D) and the head.
        columns: (N,) int64, the positions whose hidden states it takes, on the model's device; None means all T.
        **inputs: other inputs of the model's forward.

    Returns:
        The result of ``compute``.
    """
    layer = model.get_output_embeddings()
    keep = {} if columns is None else {"logits_to_keep": columns}
    if not isinstance(layer, nn.Linear):
        return compute(model(**inputs, **keep).logits, Head())
    made: list[tuple[Head, Tensor]] = []

    def forward(hidden: Tensor) -> Tensor:
        # Only here are sharded weights whole.
        head = Head(layer, model.config.get_text_config())
        made.append((head, compute(hidden, head)))
        return made[0][1].reshape(1, 1, -1)

    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        returned: Tensor = model(**inputs, **keep).logits
    finally:
        del layer.forward
    # A sharded model gathers its weights again when a gradient reaches its returned logits, so keep these in the graph.
    ((head, computed),) = made
    returned = returned.reshape(computed.shape)
    return computed + 0 * returned if head.changes_logits else returned


@torch.no_grad()
def losses_of_rows(model: Any, targets: Tensor, columns: Tensor, **inputs: Any) -> Tensor:
    """The summed cross-entropy of each row's next tokens, for evaluation.

    Args:
        model: as in :func:`at_head`.
        targets: (B, N) int64, the tokens to predict; -100 where there is none.
        columns: (N,) int64, the positions that predict them, on the model's device.
        **inputs: other inputs of the model's forward.

    Returns:
        (B,) float64.
    """

    def losses(hidden: Tensor, head: Head) -> Tensor:
        return head.losses(hidden.flatten(0, 1), targets.flatten())

    found = at_head(model, losses, columns, **inputs)
    return found.reshape(targets.shape).double().sum(dim=1)


class _PieceByPiece(torch.autograd.Function):
    """A summed loss and its gradients with respect to the head's input and weights, for some rows at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        head: Head,
        loss: RowsLoss,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *others: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[2:5]
        # The gradient scaler has not scaled these gradients yet; in float16 many would be zero.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        weights = None if weight is None else weight.to(dtype)
        by_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
        # These are sums over many pieces, and the model's dtype may have only eight bits of precision.
        by_weight = torch.zeros_like(weight, dtype=_precise_dtype(weight)) if weight is not None and wanted[1] else None
        by_bias = torch.zeros_like(bias, dtype=_precise_dtype(bias)) if bias is not None and wanted[2] else None
        total = hidden.new_zeros((), dtype=_precise_dtype(hidden))
        width = hidden.shape[1] if weight is None else weight.shape[0]
        at_once = max(1, min(ROWS, LOGITS // width))
        for start in range(0, len(hidden), at_once):
            piece = slice(start, start + at_once)
            rows = hidden[piece]
            raw = rows if weight is None else linear(rows, weight, bias)
            with torch.enable_grad():
                leaf = raw.detach().to(dtype).requires_grad_(any(wanted))
                part = loss(head._changed(leaf), *(other[piece] for other in others))
            total += part.detach()
            if not any(wanted):
                continue
            (by_logits,) = torch.autograd.grad(part, leaf)
            if by_hidden is not None:
                by_hidden[piece] = by_logits if weights is None else by_logits @ weights
            if by_weight is not None:
                by_weight += by_logits.mT @ rows.to(dtype)
            if by_bias is not None:
                by_bias += by_logits.sum(dim=0)
        ctx.gradients = by_hidden, by_weight, by_bias
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = [
            None if part is None else (part * gradient).to(dtype)
            for part, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        del ctx.gradients
        return (None, None, *found, *[None] * (len(ctx.needs_input_grad) - 5))


def _precise(logits: Tensor) -> Tensor:
    return logits.to(_precise_dtype(logits))


def _precise_dtype(of: Tensor) -> torch.dtype:
    return torch.promote_types(of.dtype, torch.float32)


@functools.cache
def _has_liger() -> bool:
    if importlib.util.find_spec("liger_kernel"):
        return True
    _log.info("liger-kernel is not installed: the loss is computed for %d positions at a time instead", ROWS)
    return False
