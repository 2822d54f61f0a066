"""What an attention module is given in a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lrsa_lit.errors import UserError


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states (B, T, width) among the arguments of an attention module."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        reason = "hands its attention no hidden states, which gates of tokens and latents need"
        raise UserError("model", reason=reason)
    return found
