"""What settings and files name by a class and its arguments, and what can be written down so: compressors, systems."""

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
    """A base of frozen dataclasses that configs hold.

    Attributes:
        kind: the plugins' name of what it is.
    """

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Class name and arguments, as in YAML."""
        arguments: dict[str, Any] = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        # Of others within it, the classes as well.
        own = ((name, getattr(self, name)) for name in arguments)
        arguments |= {name: value.to_dict() for name, value in own if isinstance(value, FromSettings)}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": arguments}

    @classmethod
    def from_dict(cls, values: Any, key: str = "") -> Self:
        """The one that :meth:`to_dict` wrote, or of a name. Only imported classes are found: a file runs no code.

        Errors call it ``key``, by default what it is.
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
    """Refuse arguments of a dataclass whose fields are simple and of another type; others are for it to check.

    A parser does this where it knows the class, and a truth value that is a text would be true.
    """
    for item in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        kind, _, nothing = str(getattr(item.type, "__name__", item.type)).partition(" | ")
        if item.name in arguments and kind in _SIMPLE and nothing in ("", "None"):
            value, (types, allowed) = arguments[item.name], _SIMPLE[kind]
            valid = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
            check_setting(item.name, value, valid or (value is None and nothing == "None"), allowed)
