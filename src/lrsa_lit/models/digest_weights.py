"""The weights of digests in a checkpoint; they fit only the base LLM that they were trained for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError
from lrsa_lit.models.backbone import Backbone
from lrsa_lit.models.checkpoint import DIGESTS, described, typed
from lrsa_lit.models.checkpoint_file import Unreadable, read
from lrsa_lit.models.identity import base_digest
from lrsa_lit.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor

BASE = "base"
"""The key under which a checkpoint's description of digests names their base LLM."""


def read_digests(path: str, backbone: Backbone) -> dict[str, Tensor]:
    """The weights of a checkpoint's digests, by their names within the digest module.

    Raises:
        UserError: it is not a checkpoint, holds no digests, or holds digests for another base LLM.
    """
    from torch import Tensor

    file = expanded("start_from", path)
    if not Path(file).exists():
        raise UserError("start_from", path, reason="does not exist")
    try:
        content = read(file)
        weights = typed(dict[str, Tensor], content.get("state_dict"), "state_dict")
    except Unreadable as error:
        reason = f"is not a checkpoint written by a fit, or is truncated or damaged ({error})"
        raise UserError("start_from", path, reason=reason) from error
    found = {name.removeprefix(DIGESTS): each for name, each in weights.items() if name.startswith(DIGESTS)}
    if not found:
        raise UserError("start_from", path, "a checkpoint with digests", reason="holds no digests")
    check_base("start_from", content, backbone)
    return found


def check_base(field: str, checkpoint: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a checkpoint whose digests were trained for another base LLM; accept one that does not name it."""
    about = described(checkpoint)
    held = about.get("digests") or {}
    if BASE not in held or held[BASE] == base_digest(backbone):
        return
    source = (about.get("backbone") or {}).get("source")
    reason = f"its digests were trained for another base model, {source!r}; this run uses {backbone.source!r}"
    raise UserError(field, reason=reason)
