"""Refuse settings of the rule that nothing reads because a system replaces the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrsa_lit.errors import UserError, under

OF_RULE = ("sink_size", "lag_size", "top_k", "chunk_size", "value_weight", "compressor")
"""Settings that no system reads. ``LRSAConfig`` itself refuses ``head_top_k`` and ``latents`` with a system."""


def check_read(changes: Mapping[str, Any], system: Any) -> None:
    """Refuse settings of an attention that its system does not read.

    A system together with all settings of the rule is allowed: resolved configs contain every setting.

    Args:
        changes: settings of an ``LRSAConfig``, as the user gives them.
        system: the system of the attention that they change, in any form; None if it has a rule.

    Raises:
        UserError: there is a system, and ``changes`` set a part of the rule.
    """
    system = changes.get("system", system)
    given = [name for name in OF_RULE if changes.get(name) is not None]
    if system is not None and given and not ("system" in changes and changes.keys() >= set(OF_RULE)):
        value = changes[given[0]]
        path = value.get("class_path") if isinstance(value, Mapping) else value
        reason = f"is not read by the system {_name(system)}"
        raise UserError(given[0], path, reason=reason, hint="leave one of them out")


def check_layers(layers: Sequence[Mapping[str, Any]]) -> None:
    """Check the layers of a run's settings, of which later ones override earlier ones.

    Settings of a rule are refused only in the layer that sets the system and in later ones. All are allowed if another
    attention of the run sets ``system`` to null, because that attention reads them.

    Raises:
        UserError: a layer sets a part of the rule that the system of the run does not read.
    """
    models = [model for layer in layers if isinstance(model := layer.get("model"), Mapping)]
    if any(map(_has_rule, models)):
        return
    # If model.digests is set, ICFormer is the run's own attention, whatever rule the defaults contain.
    digests = [model["digests"] for model in models if "digests" in model]
    system = "ICFormer" if digests and digests[-1] is not None else None
    for model in models:
        if isinstance(lrsa := model.get("lrsa"), Mapping):
            with under("model.lrsa"):
                check_read(lrsa, system)
            system = lrsa.get("system", system)


def _has_rule(model: Mapping[str, Any]) -> bool:
    evaluated = model.get("evaluate")
    attentions = [model.get("train_attention"), *(evaluated.values() if isinstance(evaluated, Mapping) else ())]
    return any(isinstance(item, Mapping) and "system" in item and item["system"] is None for item in attentions)


def _name(system: Any) -> str:
    path = system.get("class_path") if isinstance(system, Mapping) else system
    return str(path).rpartition(".")[2] if isinstance(path, str) else type(system).__name__
