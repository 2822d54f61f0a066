"""Digests in a fit's checkpoint: their weights, which fit one base LLM alone."""

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
"""What a checkpoint says of the LLM of its digests, among what describes these."""


def read_digests(path: str, backbone: Backbone) -> dict[str, Tensor]:
    """The weights of a checkpoint's digests, by their names within the part that makes them.

    Raises:
        UserError: it is no checkpoint, holds none, or those of another base LLM.
    """
    from torch import Tensor

    file = expanded("start_from", path)
    if not Path(file).exists():
        raise UserError("start_from", path, reason="does not exist")
    try:
        content = read(file)
        weights = typed(dict[str, Tensor], content.get("state_dict"), "state_dict")
    except Unreadable as error:
        reason = f"is no checkpoint that a fit has written, or a truncated or damaged one ({error})"
        raise UserError("start_from", path, reason=reason) from error
    found = {name.removeprefix(DIGESTS): each for name, each in weights.items() if name.startswith(DIGESTS)}
    if not found:
        raise UserError("start_from", path, "a fit's checkpoint of digests", reason="holds no digests")
    check_base("start_from", content, backbone)
    return found


def check_base(field: str, checkpoint: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a checkpoint whose digests were trained for another base LLM; one that does not say is taken as it is."""
    about = described(checkpoint)
    held = about.get("digests") or {}
    if BASE not in held or held[BASE] == base_digest(backbone):
        return
    source = (about.get("backbone") or {}).get("source")
    reason = f"its digests were trained for another base model, {source!r}; this run has {backbone.source!r}"
    raise UserError(field, reason=reason)
