"""Checks of a study file, except for the settings of its fits, which the parser of ``lrsa fit`` checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lrsa_lit.bounds import is_integer
from lrsa_lit.errors import UserError

Settings = dict[str, Any]

OWN = "own"
"""The inference attention that a row was trained with."""

Kind = tuple[str, Callable[[Any], bool]]
"""A description of what a setting must be, and a function that checks a value."""


def _list_of(allowed: str, holds: Callable[[Any], bool]) -> Kind:
    return f"a list of {allowed}", lambda value: isinstance(value, list) and all(map(holds, value))


def _or_null(kind: Kind) -> Kind:
    return f"{kind[0]}, or null", lambda value: value is None or kind[1](value)


_NAME: Kind = "a name", lambda value: isinstance(value, str)
_NUMBER: Kind = "a number", lambda value: isinstance(value, int | float)
_SWITCH: Kind = "true or false", lambda value: isinstance(value, bool)
_SETTINGS: Kind = "settings, each with a name", lambda value: isinstance(value, dict) and all(map(_NAME[1], value))
_MEASURE: Kind = "f1, em, recall", lambda value: value in ("f1", "em", "recall")
_SPLIT: Kind = "val, test", lambda value: value in ("val", "test")
_NAMES = _list_of("names", _NAME[1])
_LEAST: Kind = (
    f"{_MEASURE[0]}, each with a number",
    lambda value: _SETTINGS[1](value) and all(map(_MEASURE[1], value)) and all(map(_NUMBER[1], value.values())),
)
_ROWS: Kind = "the name of a row, or a list of them", lambda value: _NAME[1](value) or _NAMES[1](value)
_SEEDS = _or_null(_list_of("integers from 0 to 4294967295", lambda seed: is_integer(seed) and 0 <= seed < 1 << 32))
_CELL_NAMES: Kind = "[row, inference]", lambda value: _NAMES[1](value) and len(value) == 2
_CELLS = _list_of(*_CELL_NAMES)
_BEST: Kind = (f"{_CELL_NAMES[0]}, or a list of them", lambda value: _CELL_NAMES[1](value) or _CELLS[1](value))
_AXIS: Kind = (
    "cache, pairs, length, or a list of names",
    lambda value: value in ("cache", "pairs", "length") or _NAMES[1](value),
)
_POINT: Kind = "[row, inference], or [row, inference, set]", lambda value: _NAMES[1](value) and len(value) in (2, 3)
_POINTS = _list_of(*_or_null(_POINT))
_LINES: Kind = (
    f"names, each with {_POINTS[0]}",
    lambda value: _SETTINGS[1](value) and bool(value) and all(map(_POINTS[1], value.values())),
)

_CELL = {"row": _NAME, "inference": _NAME}
_ROW = dict.fromkeys(("trainer", "model", "data"), _SETTINGS)
_KINDS = ("data_sets", "inference", "rows", "parts", "bars", "plots")
_STUDY = {"configs": _or_null(_NAMES), "plugins": _or_null(_NAMES), "seeds": _SEEDS, **_ROW,
          **dict.fromkeys(_KINDS, _or_null(_SETTINGS))}  # fmt: skip
_DATA_SET = {"class_path": _NAME, "init_args": _or_null(_SETTINGS), "generate": _SWITCH, "measure": _MEASURE,
             "max_new_tokens": ("an integer >= 1", lambda value: is_integer(value) and value >= 1)}  # fmt: skip
_PART = {"rows": _NAMES, "seeds": _SEEDS, "inference": _NAMES, "sets": _NAMES, "split": _SPLIT,
         "generate": _SWITCH, "against": _or_null(_SETTINGS)}  # fmt: skip
_PLOT = {"title": _NAME, "set": _NAME, "x": _AXIS, "lines": _LINES}
_SET = {"set": _NAME, "measure": _MEASURE}
_AIM = {"aim": _NUMBER}
_OF_DENSE = {**_SET, "of_dense": _NUMBER, "reference": _NAMES, "reference_at_least": _LEAST}
_BARS = {
    ("set", "kept", "of_dense"): {**_OF_DENSE, "kept": _NUMBER},
    ("set", "pairs", "of_dense"): {**_OF_DENSE, "pairs": _NUMBER},
    ("set", "row", "inference", "of", "at_least"):
        {**_SET, **_CELL, **_AIM, "row": _ROWS, "of": _BEST, "at_least": _NUMBER, "cache": _NUMBER},
    ("set", "row", "inference", "at_least"): {**_SET, **_CELL, **_AIM, "row": _ROWS, "at_least": _NUMBER},
    ("set", "row", "inference", "above", "p"): {**_SET, **_CELL, "above": _CELLS, "p": _NUMBER, "draw_seeds": _SWITCH},
}  # fmt: skip
"""The allowed settings of each kind of bar, keyed by its required settings."""


def check_study(name: str, content: Any) -> None:
    """Raise a UserError if a study file has an unknown or wrong setting, or lacks a required one."""
    _check(name, content, _STUDY)
    for data_set, given in (content.get("data_sets") or {}).items():
        _check(f"{name}: data_sets.{data_set}", given, _DATA_SET, ("class_path",))
    for row, given in (content.get("rows") or {}).items():
        _check(f"{name}: rows.{row}", given or {}, _ROW | {"checkpoint": _NAME})
    attentions = content.get("inference") or {}
    _check(f"{name}: inference", attentions, dict.fromkeys(attentions, _or_null(_SETTINGS)))
    for part, given in (content.get("parts") or {}).items():
        _check(f"{name}: parts.{part}", given, _PART, ("rows", "inference", "sets"))
        if given.get("against") is not None:
            _check(f"{name}: parts.{part}.against", given["against"], _CELL, tuple(_CELL))
    for bar, given in (content.get("bars") or {}).items():
        keys = set(given) if isinstance(given, dict) else set()
        needed = next((needed for needed in _BARS if keys.issuperset(needed)), None)
        if needed is None:
            raise UserError(f"{name}: bars.{bar}", allowed=f"settings with {'; or '.join(map(', '.join, _BARS))}")
        _check(f"{name}: bars.{bar}", given, _BARS[needed])
    for plot, given in (content.get("plots") or {}).items():
        _check(f"{name}: plots.{plot}", given, _PLOT, tuple(_PLOT))
        names = given["x"]
        if isinstance(names, list) and any(len(line) > len(names) for line in given["lines"].values()):
            raise UserError(
                f"{name}: plots.{plot}.lines", reason=f"a line has more points than x has names ({len(names)})"
            )


def bar_rows(bar: Settings) -> list[str]:
    """The rows of a bar, of which the best one counts."""
    rows = bar.get("row", [])
    return [rows] if isinstance(rows, str) else rows


def bar_of(bar: Settings) -> list[list[str]]:
    """The cells [row, inference] of a bar's ``of``; the bar asks for a share of the best one's score."""
    cells = bar.get("of", [])
    return [cells] if cells and isinstance(cells[0], str) else cells


def bar_cells(bar: Settings) -> list[list[str]]:
    """All [row, inference] cells that a bar names."""
    own = [[row, bar["inference"]] for row in bar_rows(bar)]
    references = [[row, OWN] for row in bar.get("reference", [])]
    return [*own, *bar_of(bar), *bar.get("above", []), *references]


def _check(where: str, given: Any, kinds: Mapping[str, Kind], needed: Collection[str] = ()) -> None:
    if not isinstance(given, dict):
        raise UserError(where, given, _SETTINGS[0])
    if missing := [name for name in needed if name not in given]:
        raise UserError(where, reason=f"{missing[0]} is missing")
    if unknown := sorted(map(str, given.keys() - set(kinds))):
        raise UserError(where, reason=f"unknown setting {unknown[0]!r}; allowed are {', '.join(sorted(kinds))}")
    for name, value in given.items():
        allowed, holds = kinds[name]
        if not holds(value):
            field = f"{where}{'.' if ': ' in where else ': '}{name}"
            raise UserError(field, allowed=allowed, reason=f"{json.dumps(value, default=str)} is not allowed")
