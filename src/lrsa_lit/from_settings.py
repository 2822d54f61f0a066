"""Base of objects that settings and files describe by a class and its arguments: compressors, systems."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lrsa_lit import plugins
from lrsa_lit.bounds import check_setting
from lrsa_lit.errors import UserError, under

_SIMPLE: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
}


class FromSettings:
    """Base of frozen dataclasses in configs.

    Attributes:
        kind: their kind, a key of ``plugins.KINDS``.
    """

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The class and its arguments, as in YAML."""
        arguments: dict[str, Any] = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        # For nested objects, record their classes, too.
        own = ((name, getattr(self, name)) for name in arguments)
        arguments |= {name: value.to_dict() for name, value in own if isinstance(value, FromSettings)}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}

    @classmethod
    def from_dict(cls, values: Any, key: str = "") -> Self:
        """The object from a dict of :meth:`to_dict`, or from a class name. A file cannot cause imports or run code.

        Errors name ``key``, by default the kind.
        """
        title, base = key or plugins.KINDS[cls.kind].title, plugins.KINDS[cls.kind].base
        values = {"class_path": values} if isinstance(values, str) else values
        if not isinstance(values, dict):
            raise UserError(title, values, f"a {base}, its name, or its dict")
        found = plugins.find(cls.kind, values.get("class_path"), title)
        arguments = values.get("init_args") or {}
        if unnamed := [name for name in arguments if not isinstance(name, str)]:
            raise UserError(f"{title}.init_args", unnamed[0], "a name; YAML reads no, on … as one only in quotes")
        try:
            with under(f"{title}.init_args"):
                check_types(found, arguments)
                made: Self = found(**arguments)
        except TypeError as error:
            raise UserError(title, found.__name__, reason=f"does not take these init_args ({error})") from None
        return made


def check_types(found: type, arguments: Mapping[str, Any]) -> None:
    """Check the types of a dataclass's simple arguments; it checks the others itself.

    Parsers check types only if they know the class. Without this check, the text "false" would count as true.
    """
    for item in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        kind, _, nothing = str(getattr(item.type, "__name__", item.type)).partition(" | ")
        if item.name in arguments and kind in _SIMPLE and nothing in ("", "None"):
            value, (types, allowed) = arguments[item.name], _SIMPLE[kind]
            valid = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
            check_setting(item.name, value, valid or (value is None and nothing == "None"), allowed)
