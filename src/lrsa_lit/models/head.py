"""What the hidden states of a causal language model become at its output head, without ever holding all logits at once.

Dimensions: B examples, T tokens, N positions of each, M positions of all, D width of the model, V vocabulary.
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
"""Most positions whose logits exist at a time."""

LOGITS = 1 << 25
"""Most logits at a time. A loss holds several tensors of so many float32: of a vocabulary of 128k, half a gigabyte each
in 1,024 rows."""

RowsLoss = Callable[..., Tensor]
"""Sums a loss over rows: from logits (rows, V) and as many rows of further tensors."""

_AFTERWARDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, divisor: logits / divisor,
}
"""What models do to logits behind their head, by the name in their configuration; 1.0 and None leave them alone."""

_log = logging.getLogger(__name__)


class Head:
    """An output head that makes logits of some rows at a time, to be made and used inside of the model's own forward.

    Args:
        layer: the model's; None where the rows are logits already.
        config: of the text model, which says what happens to logits afterwards.
    """

    def __init__(self, layer: nn.Linear | None = None, config: Any = None) -> None:
        self.weight: Tensor | None = None if layer is None else layer.weight
        self.bias: Tensor | None = None if layer is None else layer.bias
        values = {name: getattr(config, name, None) for name in _AFTERWARDS}
        self._afterwards = {name: value for name, value in values.items() if value not in (None, 1.0)}

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, V), at least float32, of (M, D)."""
        hidden, weight, bias = self._operands(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._changed(hidden if weight is None else linear(hidden, weight, bias))

    def as_autocast(self) -> Head:
        """Itself, its weights in the dtype that autocast computes linear layers in: once for many calls."""
        device = "cpu" if self.weight is None else self.weight.device.type
        if self.weight is None or not torch.is_autocast_enabled(device):
            return self
        head, dtype = copy.copy(self), torch.get_autocast_dtype(device)
        head.weight = self.weight.to(dtype)
        head.bias = None if self.bias is None else self.bias.to(dtype)
        return head

    @torch.no_grad()
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy (M,) of each row, piece by piece; without a gradient.

        Args:
            hidden: (M, D).
            targets: (M,) int64, -100 where there is none.
        """
        head = self.as_autocast()
        parts = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([cross_entropy(head.logits(rows), wanted, reduction="none") for rows, wanted in parts])

    def summed(self, loss: RowsLoss, hidden: Tensor, *others: Tensor) -> Tensor:
        """The sum of a loss over all rows, at most ``ROWS`` at a time, in the forward and in the backward pass.

        Args:
            loss: called with logits (R, V) and R rows of each of the others; only the logits get a gradient.
            hidden: (M, D).
            others: what else has M rows.

        Returns:
            At least float32, no dimensions.
        """
        hidden, weight, bias = self._operands(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            total: Tensor = _PieceByPiece.apply(self, loss, hidden, weight, bias, *others)
        return total

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropies, fused by liger-kernel on a GPU, else piece by piece.

        The fused kernel waits for the GPU once, to count the targets. Few positions are not worth that.

        Args:
            hidden: (M, D).
            targets: (M,) int64, -100 where there is none.
        """
        head = self.as_autocast()
        on_gpu = hidden.device.type == "cuda" and len(targets) > ROWS
        # In float16 its gradients, which no scaler has scaled yet, would underflow.
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
        """Whether the model does something to logits behind the layer."""
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
    """Run a model up to its output head, and something else in place of that.

    It runs inside of the model's own forward: only there are sharded weights whole. A model whose head is no plain
    linear layer makes the logits itself.

    Args:
        model: a causal language model of transformers, or peft's wrapper around it.
        compute: takes the hidden states (B, N, D) and the head.
        columns: (N,) int64, the positions whose hidden states it takes, on the model's device; None for all T.
        **inputs: what else the model's forward takes.

    Returns:
        What ``compute`` returns.
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
    # A sharded model gathers its weights again when a gradient reaches what it returned, whatever it has made of it.
    ((head, computed),) = made
    returned = returned.reshape(computed.shape)
    return computed + 0 * returned if head.changes_logits else returned


@torch.no_grad()
def losses_of_rows(model: Any, targets: Tensor, columns: Tensor, **inputs: Any) -> Tensor:
    """Sums of the cross-entropies of each row's next tokens, to evaluate with.

    Args:
        model: as for :func:`at_head`.
        targets: (B, N) int64, the tokens to predict; -100 where there is none.
        columns: (N,) int64, the positions that predict them, on the model's device.
        **inputs: what else the model's forward takes.

    Returns:
        (B,) float64.
    """

    def losses(hidden: Tensor, head: Head) -> Tensor:
        return head.losses(hidden.flatten(0, 1), targets.flatten())

    found = at_head(model, losses, columns, **inputs)
    return found.reshape(targets.shape).double().sum(dim=1)


class _PieceByPiece(torch.autograd.Function):
    """A summed loss and its gradients by a head's input and weights, computed together for some rows at a time."""

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
        # No scaler has scaled these gradients yet: in float16 many would be zero.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        weights = None if weight is None else weight.to(dtype)
        by_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
        # Sums over many pieces, and a model's own dtype may have eight bits.
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
    _log.info("liger-kernel is not installed: the loss takes %d positions at a time instead", ROWS)
    return False
