"""What LRSA attaches to a model's attention modules, and what it reads of the model's calls and config."""

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
"""Sees a layer's rule, the layout of the call, query, key and value."""


@dataclass(eq=False)
class Enabled:
    """What ``enable`` changed on a model, so that ``disable`` can put it back."""

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
    """What is attached to the attention of one layer: a rule (of each head), or a system, or neither if it is dense."""

    state: Enabled
    rule: Rule | HeadRules | None
    layer: int
    system: System | None
    place: Place
    # As a compiled layer takes it.
    rule_tensor: Tensor | None = None
    # The weights (H, width) by which a TokenGate's tokens are scored.
    gate: Tensor | None = None
    has_attended: bool = False
    # Of the last call, until a first call has shown that each layer attends once.
    layout: Layout | None = None


def enabled_state(model: PreTrainedModel) -> Enabled | None:
    """What is attached to the model, or None."""
    attached: list[AttachedRule] = [getattr(module, RULE) for module in model.modules() if hasattr(module, RULE)]
    return attached[0].state if attached else None


def base_of(model: Any) -> Any:
    """The Hugging Face model inside a peft wrapper; any other model is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def arguments_by_name(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call as keywords."""
    signature = inspect.signature(decoder.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    extra = [name for name, item in signature.parameters.items() if item.kind is item.VAR_KEYWORD]
    keywords = given.pop(extra[0], {}) if extra else {}
    return {**given, **keywords}


def tokens_of_call(given: dict[str, Any]) -> Tensor | None:
    """The ids (B, T) or embeddings (B, T, width) of a forward call, if it has any; without, transformers refuses it."""
    return next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)


def cache_of_call(*arguments: Any) -> Cache | None:
    """The cache among the arguments of a forward call, whatever this version of transformers calls it."""
    return next((value for value in arguments if isinstance(value, Cache)), None)


def cache_argument(model: Any, cache: Cache | None) -> dict[str, Any]:
    """A cache as a keyword of the model's ``forward`` and ``generate``: ``cache`` since transformers 5.24."""
    known = inspect.signature(base_of(model).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


def given_or_stored(config: LRSAConfig | None, model: PreTrainedModel) -> LRSAConfig:
    """The rule that the caller gave, or else the one in the model's ``config.json``; a UserError if there is none."""
    if config is not None:
        return config
    stored = getattr(model.config, "lrsa", None)
    if stored is None:
        raise UserError("config", reason="the model's config.json holds no LRSA rule; pass an LRSAConfig")
    with under("config.lrsa"):
        return LRSAConfig.from_dict(stored)


def warn_if_trained_otherwise(model: PreTrainedModel, config: LRSAConfig) -> None:
    """One line if the weights say that they were trained with another rule or system."""
    warn_of_others(getattr(model.config, "lrsa", None), [config])


def warn_of_others(trained_with: dict[str, Any] | None, configs: Sequence[LRSAConfig]) -> None:
    """The same if none of the configs, of which the first is named, is what weights were trained with; None: dense."""
    now = [_read_of(config.to_dict()) for config in configs]
    if trained_with is not None and (before := _read_of(trained_with)) not in now:
        _warn_once(f"the weights were trained with {_described(before)} and now run with {_described(now[0])}")


def _read_of(rule: Any) -> Any:
    """A rule's dict without what attention does not depend on: what a system does not read, and what caches hold.

    The dict comes from a ``config.json``, which may hold anything.
    """
    if not isinstance(rule, dict):
        return rule
    if isinstance(rule.get("system"), dict):
        return {name: rule.get(name) for name in ("system", "dense_layers")}
    return {name: value for name, value in rule.items() if name != "latents"}


def _described(rule: Any) -> str:
    """What :func:`_read_of` has left; a system by its name."""
    if not isinstance(rule, dict) or not isinstance(system := rule.get("system"), dict):
        return str(rule)
    dense = {"dense_layers": rule["dense_layers"]} if rule["dense_layers"] else {}
    return f"the system {str(system.get('class_path')).rpartition('.')[2]} {system.get('init_args', {}) | dense}"


@functools.lru_cache
def _warn_once(message: str) -> None:
    """An evaluation switches back and forth between rules; each is worth one line."""
    _log.warning("%s", message)
