"""A run's settings as flat params, without those that equal the defaults."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch.optim.lr_scheduler import LRScheduler

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.classes import named_class
from lrsa_lit.models.backbone import Backbone, LoRA
from lrsa_lit.models.rope import RopeScaling
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.paths import shipped
from lrsa_lit.systems import System
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.uris import register

_MAX_PARAM = 250
_ALWAYS = {
    *(f"model.lrsa.{name}" for name in ("sink_size", "lag_size", "top_k", "chunk_size")),
    *("model.backbone.source", "model.optimizer", "model.optimizer.lr"),
    *("trainer.max_steps", "data", "data.max_tokens", "data.batch_size"),
}
"""Params that are always logged, because runs are compared by them."""

_KINDS: dict[str, Any] = {
    "model": LongContextQA,
    "model.backbone": Backbone,
    "model.backbone.lora": LoRA,
    "model.backbone.rope_scaling": RopeScaling,
    "model.lrsa": LRSAConfig,
    "trainer": Trainer,
}
_BY_NAME = (Compressor, System, LRScheduler)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def beside_defaults(values: Mapping[str, Any]) -> dict[str, str]:
    """The :func:`flatten`-ed settings that differ from the shipped defaults, or from the defaults of their class.

    Settings that runs are compared by, such as lag size, K, model and learning rate, are always included.
    """
    flat = flatten(values)
    register()
    shipped_flat = flatten(OmegaConf.to_container(OmegaConf.load(shipped("cli.yaml"))))
    # The shipped defaults of a class do not apply to another class in its place.
    replaced = tuple(f"{name}." for name in shipped_flat if flat.get(name) != shipped_flat[name])
    defaults: dict[str, str | None] = {**flatten(_own_defaults(values))}
    defaults |= {name: _resolved(text, flat) for name, text in shipped_flat.items() if not name.startswith(replaced)}
    return {name: text for name, text in flat.items() if name in _ALWAYS or defaults.get(name) != text}


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested config values with dotted keys, without ``class_path`` and ``init_args``, cut to MLflow's maximum length.

    Logger and callbacks are left out: they do not change what a run does, and config.yaml has them.
    """
    key = prefix.rstrip(".")
    if key in ("trainer.logger", "trainer.callbacks"):
        return {}
    if not isinstance(values, Mapping) or not values:
        text = f"{values:.6g}" if isinstance(values, float) else str(values)
        return {key: text[:_MAX_PARAM]}
    if "class_path" in values:
        arguments = values.get("init_args")
        return {key: str(values["class_path"])} | (flatten(arguments, prefix) if arguments else {})
    parts = [flatten(value, f"{prefix}{name}.") for name, value in values.items()]
    return {name: value for part in parts for name, value in part.items()}


def _resolved(text: str, flat: Mapping[str, str]) -> str | None:
    """A shipped default, with a reference to another setting replaced by that setting's value."""
    reference = _REFERENCE.fullmatch(text)
    return flat.get(reference[1].replace(".init_args", "")) if reference else text


def _own_defaults(values: Any, prefix: str = "") -> Any:
    """The defaults of the constructors that receive the settings, nested like the settings."""
    if not isinstance(values, Mapping):
        return None
    if "class_path" in values:
        kind, given = _imported(str(values["class_path"])), values.get("init_args") or {}
    else:
        kind, given = _KINDS.get(prefix.rstrip(".")), values
    own = {} if kind is None else _arguments(kind)
    below = {name: _own_defaults(value, f"{prefix}{name}.") for name, value in given.items() if _is_nested(value)}
    return own | below


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    # The parser does not resolve short names where it knows no type: in further attentions and in schedules.
    return getattr(importlib.import_module(module), name) if module else named_class("", name, _BY_NAME)


def _arguments(kind: Any) -> dict[str, Any]:
    """The defaults of a class's arguments, including those of its base classes."""
    found: dict[str, Any] = {}
    for each in getattr(kind, "__mro__", (kind,)):
        with contextlib.suppress(ValueError):  # some classes written in C have no signature
            for name, argument in inspect.signature(each).parameters.items():
                default = argument.default
                if default is not argument.empty:
                    found.setdefault(name, list(default) if isinstance(default, tuple) else default)
    return found
