"""What LRSA attaches to a model's attention modules, and functions that read the model's calls and config."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lrsa_lit.attention.config import LRSAConfig
from lrsa_lit.attention.layout import Layout
from lrsa_lit.errors import UserError, under
from lrsa_lit.ops.sparse_attention import HeadRules, Impl, Rule
from lrsa_lit.systems.system import Place, System

RULE = "_lrsa_rule"
"""The attribute of an attention module that holds its :class:`AttachedRule`."""

_log = logging.getLogger(__name__)

Observe = Callable[["AttachedRule", Layout, Tensor, Tensor, Tensor], None]
"""An observer, called with a layer's rule, the call's layout, query, key and value."""


@dataclass(eq=False)
class Enabled:
    """What ``enable`` changed on a model, so that ``disable`` can undo it."""

    config: LRSAConfig
    impl: Impl
    implementation: str
    modules: list[nn.Module]
    trained_with: dict[str, Any] | None
    handles: list[Any] = field(default_factory=list)
    checked: bool = False
    observe: Observe | None = None


@dataclass(eq=False)
class AttachedRule:
    """What is attached to the attention of one layer: a rule (or one per head), a system, or neither if it is dense."""

    state: Enabled
    rule: Rule | HeadRules | None
    layer: int
    system: System | None
    place: Place
    # The rule as a tensor, for compiled layers.
    rule_tensor: Tensor | None = None
    # The weights (H, width) with which a TokenGate scores tokens.
    gate: Tensor | None = None
    has_attended: bool = False
    # The layout of the last call; set only until the first call has shown that each layer attends once.
    layout: Layout | None = None


def enabled_state(model: PreTrainedModel) -> Enabled | None:
    """The state that ``enable`` attached to the model, or None."""
    attached: list[AttachedRule] = [getattr(module, RULE) for module in model.modules() if hasattr(module, RULE)]
    return attached[0].state if attached else None


def base_of(model: Any) -> Any:
    """The Hugging Face model inside a peft wrapper; any other model is returned unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def arguments_by_name(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call as keywords."""
    signature = inspect.signature(decoder.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    extra = [name for name, item in signature.parameters.items() if item.kind is item.VAR_KEYWORD]
    keywords = given.pop(extra[0], {}) if extra else {}
    return {**given, **keywords}


def tokens_of_call(given: dict[str, Any]) -> Tensor | None:
    """The ids (B, T) or embeddings (B, T, width) of a forward call; None without them, which transformers refuses."""
    return next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def cache_of_call(*arguments: Any) -> Cache | None:
    """The cache among the arguments of a forward call, whose name depends on the version of transformers."""
    return next((value for value in arguments if isinstance(value, Cache)), None)


def cache_argument(model: Any, cache: Cache | None) -> dict[str, Any]:
    """A cache as a keyword of the model's ``forward`` and ``generate``, named ``cache`` since transformers 5.24."""
    known = inspect.signature(base_of(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def given_or_stored(config: LRSAConfig | None, model: PreTrainedModel) -> LRSAConfig:
    """The given rule, or else the one in the model's ``config.json``; a UserError if there is none."""
    if config is not None:
        return config
    stored = getattr(model.config, "lrsa", None)
    if stored is None:
        raise UserError("config", reason="the model's config.json holds no LRSA rule; pass an LRSAConfig")
    with under("config.lrsa"):
        return LRSAConfig.from_dict(stored)


def warn_if_trained_otherwise(model: PreTrainedModel, config: LRSAConfig) -> None:
    """Log one warning if the model's config says that its weights were trained with another rule or system."""
    warn_of_others(getattr(model.config, "lrsa", None), [config])


def warn_of_others(trained_with: dict[str, Any] | None, configs: Sequence[LRSAConfig]) -> None:
    """Log one warning if the weights were trained with none of the configs. It names the first; None means dense."""
    now = [_read_of(config.to_dict()) for config in configs]
    if trained_with is not None and (before := _read_of(trained_with)) not in now:
        _warn_once(f"the weights were trained with {_described(before)} and now run with {_described(now[0])}")


def _read_of(rule: Any) -> Any:
    """A rule's dict without settings that do not affect attention: those that its system does not read, and latents.

    The dict comes from a ``config.json``, which may hold anything.
    """
    if not isinstance(rule, dict):
        return rule
    if isinstance(rule.get("system"), dict):
        return {name: rule.get(name) for name in ("system", "dense_layers")}
    return {name: value for name, value in rule.items() if name != "latents"}


def _described(rule: Any) -> str:
    """Text for the result of :func:`_read_of`; a system appears by its name."""
    if not isinstance(rule, dict) or not isinstance(system := rule.get("system"), dict):
        return str(rule)
    dense = {"dense_layers": rule["dense_layers"]} if rule["dense_layers"] else {}
    return f"the system {str(system.get('class_path')).rpartition('.')[2]} {system.get('init_args', {}) | dense}"


@functools.lru_cache
def _warn_once(message: str) -> None:
    """Log a warning once: an evaluation that switches between rules would repeat it."""
    _log.warning("%s", message)
