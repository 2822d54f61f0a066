"""What the settings of a study may be, each checked when the file is read: no parser looks at them later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lrsa_lit.bounds import is_integer, is_weight
from lrsa_lit.errors import UserError
from lrsa_lit.study.settings import Settings

MEASURES = ("f1", "em", "recall")
"""What answers are measured by."""

TRAINER = ("max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches")
"""The settings of the trainer that a study has a use for."""

MODEL = ("backbone", "lrsa", "optimizer", "lr_scheduler", "train_attention", "train_top_k", "evaluate",
         "max_new_tokens")  # fmt: skip
DATA = ("max_tokens", "batch_size", "eval_batch_size", "num_workers", "weights")
"""Arguments of the mixture that a row trains on; a study makes its batches by no others."""

_SPLITS = ("train", "val", "test")


class Kind(NamedTuple):
    """What a setting may be.

    Attributes:
        allowed: in words.
        holds: whether a value is that.
    """

    allowed: str
    holds: Callable[[Any], bool]


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(holds(item) for item in value)


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.allowed}, or null", lambda value: value is None or kind.holds(value))


def _one_of(values: Collection[str]) -> Kind:
    return Kind(", ".join(values), lambda value: value in values)


def _at_least(least: int) -> Kind:
    return Kind(f"an integer >= {least}", lambda value: is_integer(value) and value >= least)


def _are_weights(value: Any) -> bool:
    return _is_settings(value) and all(map(is_weight, value.values()))


_NAME = Kind("a name", _is_name)
_NAMES = Kind("a list of names", _is_list_of(_is_name))
_SEEDS = Kind(
    "a list of integers from 0 to 4294967295", _is_list_of(lambda seed: is_integer(seed) and 0 <= seed < 1 << 32)
)
_SETTINGS = Kind("settings, each with a name", _is_settings)
_SWITCH = Kind("true or false", lambda value: isinstance(value, bool))

_OVERLAY = dict.fromkeys(("trainer", "model", "data"), _SETTINGS)
_STUDY = {
    "configs": _or_null(_NAMES),
    "seeds": _or_null(_SEEDS),
    **_OVERLAY,
    **dict.fromkeys(("data_sets", "inference", "rows", "parts", "bars"), _or_null(_SETTINGS)),
}
_DATA_SET = {"class_path": _NAME, "init_args": _or_null(_SETTINGS), "generate": _SWITCH, "measure": _one_of(MEASURES)}
_CELL = {"row": _NAME, "inference": _NAME}
_PART = {
    "rows": _NAMES,
    "seeds": _or_null(_SEEDS),
    "inference": _NAMES,
    "sets": _NAMES,
    "split": _one_of(_SPLITS),
    "generate": _SWITCH,
    "against": _or_null(_SETTINGS),
}
_ROW = {
    "trainer.max_steps": _at_least(0),
    "trainer.accumulate_grad_batches": _or_null(_at_least(1)),
    "model.backbone": _SETTINGS,
    "model.backbone.source": _NAME,
    "model.lrsa": _SETTINGS,
    "model.optimizer": _SETTINGS,
    "model.train_attention": _or_null(_SETTINGS),
    "model.max_new_tokens": _at_least(1),
    "data.init_args": _SETTINGS,
    "data.init_args.batch_size": _at_least(1),
    "data.init_args.weights": Kind("data sets, each with a number >= 0", _are_weights),
}
_OPTIONAL = ("trainer.accumulate_grad_batches", "model.train_attention", "model.max_new_tokens")


def check_study(name: str, content: Any) -> None:
    """Check what a study file holds: which settings, and of which kinds.

    Args:
        name: of the file, for messages.
        content: of the file.

    Raises:
        UserError: a setting is unknown, missing or of another kind.
    """
    _check(name, content, _STUDY)
    for data_set, given in (content.get("data_sets") or {}).items():
        _check(f"{name}: data_sets.{data_set}", given, _DATA_SET, ("class_path",))
    for row, given in (content.get("rows") or {}).items():
        _check(f"{name}: rows.{row}", given or {}, _OVERLAY)
    for attention, given in (content.get("inference") or {}).items():
        _check_kind(f"{name}: inference.{attention}", given, _or_null(_SETTINGS))
    for part, given in (content.get("parts") or {}).items():
        _check(f"{name}: parts.{part}", given, _PART, ("rows", "inference", "sets"))
        if given.get("against") is not None:
            _check(f"{name}: parts.{part}.against", given["against"], _CELL, tuple(_CELL))


def check_overlay(where: str, overlay: Settings, trainer: Collection[str]) -> None:
    """Refuse settings of a study or row that nothing would read.

    Args:
        where: the overlay, for messages.
        overlay: its ``trainer``, ``model`` and ``data``.
        trainer: settings of the trainer that the files below have; most are for fits alone.
    """
    allowed = {"trainer": {*TRAINER, *trainer}, "model": set(MODEL), "data": {"class_path", "init_args"}}
    for key, names in allowed.items():
        _check_known(f"{where}{key}", overlay.get(key, {}), names)
    arguments = overlay.get("data", {}).get("init_args", {})
    _check_kind(f"{where}data.init_args", arguments, _SETTINGS)
    _check_known(f"{where}data.init_args", arguments, set(DATA))


def check_row(where: str, complete: Settings) -> None:
    """Check the values of a row that are not another class's to check.

    Args:
        where: the row, for messages.
        complete: its settings, those of the files below included.
    """
    for key, kind in _ROW.items():
        *path, last = key.split(".")
        value: Any = complete
        for name in path:
            value = value.get(name)
        if last in value:
            _check_kind(f"{where}{key}", value[last], kind)
        elif key not in _OPTIONAL:
            raise UserError(f"{where}{key} is missing; it must be {kind.allowed}")


def _check(where: str, given: Any, kinds: Mapping[str, Kind], needed: Collection[str] = ()) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{where}: {given!r} is not allowed; it must be settings")
    if missing := [name for name in needed if name not in given]:
        raise UserError(f"{where}: {missing[0]} is missing")
    _check_known(where, given, kinds)
    for name, value in given.items():
        _check_kind(f"{where}{'.' if ': ' in where else ': '}{name}", value, kinds[name])


def _check_known(where: str, given: Mapping[str, Any], allowed: Collection[str]) -> None:
    if unknown := sorted(map(str, given.keys() - set(allowed))):
        raise UserError(f"{where}: there is no setting {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")


def _check_kind(where: str, value: Any, kind: Kind) -> None:
    if not kind.holds(value):
        raise UserError(f"{where}: {value!r} is not allowed; it must be {kind.allowed}")
