"""The weights that a run starts with."""

from __future__ import annotations

from lrsa_lit.errors import UserError, named
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.sources import trained_model
from lrsa_lit.tasks.digests import Digests


def begun(start_from: str | None, backbone: Backbone, digests: Digests | None = None) -> Trained:
    """The model that a run starts with, not loaded yet.

    Args:
        start_from: a fit's checkpoint or a folder of adapters; None means the backbone's weights.
        backbone: the run's backbone.
        digests: the run's digests, if any. They load their weights from ``start_from``, and the model keeps the
            backbone's.

    Raises:
        UserError: ``start_from`` cannot be read, or it holds adapters but the run trains all weights, or the reverse.
    """
    if digests is not None:
        digests.start(start_from)
    if digests is not None or start_from is None:
        return Trained(backbone, None, None)
    with named("start_from"):
        found = trained_model(start_from, backbone.dtype)
    if found.weights is None:
        raise UserError("start_from", start_from, "a fit's checkpoint (.ckpt), or a folder of adapters",
                        hint="a whole model is a model.backbone.source")  # fmt: skip
    held, trained = ("all weights" if each.lora is None else "adapters" for each in (found.backbone, backbone))
    if held != trained:
        reason = f"holds {held}, but this run trains {trained}"
        hint = "convert it by lrsa export and set it as model.backbone.source"
        raise UserError("start_from", start_from, reason=reason, hint=hint)
    return Trained(backbone, None, found.weights)
