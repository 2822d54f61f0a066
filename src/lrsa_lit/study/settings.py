"""Settings in the words of the command line's YAML, for where its parser is not installed.

Files and overlays are merged, ``${a.b}`` is replaced by the setting of that name, and ``class_path`` with ``init_args``
becomes an object: the part of the command line's own rules that the shipped defaults need.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lrsa_lit.classes import argument_kinds, named_class
from lrsa_lit.errors import UserError
from lrsa_lit.paths import check_path, shipped
from lrsa_lit.yaml_file import read_settings

Settings = dict[str, Any]
Made = TypeVar("Made")

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def read(name: str) -> Settings:
    """A YAML file, from here or as it ships with the project.

    Raises:
        UserError: there is none, or it is no mapping, or has a key twice.
    """
    check_path("study", name)
    try:
        path = Path(name) if Path(name).is_file() else shipped(name)
    except FileNotFoundError:
        raise UserError(f"{name}: it is no file here, nor a shipped one") from None
    return read_settings(path)


def merged(below: Any, above: Any) -> Any:
    """Mappings key by key, anything else by the upper one. Another class takes none of the lower one's arguments."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    return {key: merged(below[key], above[key]) if key in below and key in above else above.get(key, below.get(key))
            for key in [*below, *(key for key in above if key not in below)]}  # fmt: skip


def resolved(settings: Settings) -> Settings:
    """All ``${a.b}`` replaced by what stands there; what names no setting, as ``${oc.env:…}``, stays as it is."""

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item) for item in value]
        found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        return fill(_at(settings, found[1])) if found else value

    return {key: fill(value) for key, value in settings.items()}


def _at(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise UserError(f"${{{path}}}: there is no such setting")
        value = value[key]
    return value


def made(value: Any, *kinds: type, partial: bool = False, owner: type | None = None) -> Any:
    """The object that ``class_path`` and ``init_args`` describe, nested ones included; anything else as it is.

    Args:
        value: a setting.
        kinds: the object must be of one of these types.
        owner: the class that takes the object as an argument, where one does.
        partial: give a function that still takes the first arguments, as for optimizers, in place of the object.

    Raises:
        UserError: no such class, one of another kind, or arguments that it does not take.
    """
    if isinstance(value, list):
        return [made(item, *kinds, owner=owner) for item in value]
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    cls = named_class("class_path", value["class_path"], kinds, owner)
    given = (value.get("init_args") or {}).items()
    arguments = {name: made(item, *kinds, *argument_kinds(cls, name), owner=cls) for name, item in given}
    if not partial:
        return called(value["class_path"], cls, arguments)
    try:
        inspect.signature(cls).bind_partial(**arguments)
    except TypeError as error:
        raise UserError(f"{value['class_path']}: {error}") from None
    return functools.partial(cls, **arguments)


def called(name: str, cls: Callable[..., Made], arguments: Mapping[str, Any]) -> Made:
    """What a class makes of settings.

    Raises:
        UserError: it takes no such arguments; the line begins with ``name``.
    """
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None
