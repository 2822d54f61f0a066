"""What settings and files name by a class and its arguments, and what can be written down so: compressors, systems."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from lrsa_lit import plugins
from lrsa_lit.errors import UserError, under


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
                made: Self = found(**arguments)
        except TypeError as error:
            raise UserError(title, found.__name__, reason=f"does not take these init_args ({error})") from None
        return made
