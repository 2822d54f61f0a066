"""The weights that a run begins with."""

from __future__ import annotations

from lrsa_lit.errors import UserError, named
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.sources import trained_model
from lrsa_lit.tasks.digests import Digests


def begun(start_from: str | None, backbone: Backbone, digests: Digests | None = None) -> Trained:
    """The model that a run begins with, not loaded yet.

    Args:
        start_from: a fit's checkpoint or a folder of adapters; None begins with the backbone's own weights.
        backbone: the run's.
        digests: the run's, which begin with those of a checkpoint beside the backbone's own weights.

    Raises:
        UserError: ``start_from`` cannot be read, or holds adapters where all weights are trained, or the reverse.
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
        reason = f"holds {held}, and this run trains {trained}"
        raise UserError("start_from", start_from, reason=reason, hint="lrsa export makes it a model.backbone.source")
    return Trained(backbone, None, found.weights)
