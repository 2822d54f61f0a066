"""Find a model from the name or path that a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrsa_lit.models.adapters import holds_adapters, load_adapters
from lrsa_lit.models.backbone import Backbone
from lrsa_lit.models.checkpoint import Trained, load_trained
from lrsa_lit.models.checkpoint_file import SUFFIX


def trained_model(source: str, dtype: Any, *, trust_remote_code: bool = False) -> Trained:
    """The model of a source: a fit's checkpoint, a folder of adapters, or any source of a :class:`Backbone`.

    Args:
        source: a checkpoint (.ckpt), a folder or a hub name. A model's ``config.json`` may hold a rule.
        dtype: dtype to load the weights in.
        trust_remote_code: run the code that comes with the model.

    Returns:
        The model, not loaded yet.

    Raises:
        UserError: it is none of these.
    """
    if source.endswith(SUFFIX):
        return load_trained(Path(source), dtype, trust_remote_code=trust_remote_code)
    if holds_adapters(Path(source)):
        return load_adapters(Path(source), dtype, trust_remote_code=trust_remote_code)
    backbone = Backbone(source, dtype=dtype, trust_remote_code=trust_remote_code)
    return Trained(backbone, getattr(backbone.config, "lrsa", None), None)
