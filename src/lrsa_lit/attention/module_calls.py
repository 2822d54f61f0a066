"""Access to the arguments of an attention module's forward call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrsa_lit.errors import UserError


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states (B, T, width) among the arguments of an attention module."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        reason = "passes no hidden states to its attention, which TokenGate and latents need"
        raise UserError("model", reason=reason)
    return found
