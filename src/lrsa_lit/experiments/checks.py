"""What a study file may hold beside the settings of its fits, which the parser of ``lrsa fit`` checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lrsa_lit.bounds import is_integer
from lrsa_lit.errors import UserError

MEASURES = ("f1", "em", "recall")
"""What answers are measured by."""


class Kind(NamedTuple):
    """What a setting may be.

    Attributes:
        allowed: in words.
        holds: whether a value is that.
    """

    allowed: str
    holds: Callable[[Any], bool]


def _one_of(*values: object) -> Kind:
    return Kind(", ".join(map(str, values)), lambda value: value in values)


def _list_of(allowed: str, holds: Callable[[Any], bool]) -> Kind:
    return Kind(f"a list of {allowed}", lambda value: isinstance(value, list) and all(map(holds, value)))


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.allowed}, or null", lambda value: value is None or kind.holds(value))


_NAME = Kind("a name", lambda value: isinstance(value, str))
_NAMES = _list_of("names", _NAME.holds)
_SEEDS = _or_null(_list_of("integers from 0 to 4294967295", lambda seed: is_integer(seed) and 0 <= seed < 1 << 32))
_SETTINGS = Kind("settings, each with a name", lambda value: isinstance(value, dict) and all(map(_NAME.holds, value)))
_SWITCH = Kind("true or false", lambda value: isinstance(value, bool))

_ROW = dict.fromkeys(("trainer", "model", "data"), _SETTINGS)
_STUDY = {"configs": _or_null(_NAMES), "plugins": _or_null(_NAMES), "seeds": _SEEDS, **_ROW,
          **dict.fromkeys(("data_sets", "inference", "rows", "parts", "bars"), _or_null(_SETTINGS))}  # fmt: skip
_DATA_SET = {"class_path": _NAME, "init_args": _or_null(_SETTINGS), "generate": _SWITCH, "measure": _one_of(*MEASURES)}
_CELL = {"row": _NAME, "inference": _NAME}
_PART = {"rows": _NAMES, "seeds": _SEEDS, "inference": _NAMES, "sets": _NAMES, "split": _one_of("val", "test"),
         "generate": _SWITCH, "against": _or_null(_SETTINGS)}  # fmt: skip


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
        _check(f"{name}: rows.{row}", given or {}, _ROW)
    _check(f"{name}: inference", content.get("inference") or {}, None)
    for part, given in (content.get("parts") or {}).items():
        _check(f"{name}: parts.{part}", given, _PART, ("rows", "inference", "sets"))
        if given.get("against") is not None:
            _check(f"{name}: parts.{part}.against", given["against"], _CELL, tuple(_CELL))


def _check(where: str, given: Any, kinds: Mapping[str, Kind] | None, needed: Collection[str] = ()) -> None:
    """Check settings, of which all are settings or null where no kinds are given."""
    if not isinstance(given, dict):
        raise UserError(where, given, _SETTINGS.allowed)
    kinds = dict.fromkeys(given, _or_null(_SETTINGS)) if kinds is None else kinds
    if missing := [name for name in needed if name not in given]:
        raise UserError(where, reason=f"{missing[0]} is missing")
    if unknown := sorted(map(str, given.keys() - set(kinds))):
        raise UserError(where, reason=f"there is no setting {unknown[0]!r}; allowed are {', '.join(sorted(kinds))}")
    for name, value in given.items():
        if not kinds[name].holds(value):
            field = f"{where}{'.' if ': ' in where else ': '}{name}"
            raise UserError(
                field, allowed=kinds[name].allowed, reason=f"{json.dumps(value, default=str)} is not allowed"
            )
