"""Classes that settings name by ``class_path``: a setting makes objects of its own kind and calls nothing else."""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any

from lrsa_lit.errors import UserError

Kinds = tuple[type, ...]

_LIBRARIES = frozenset({"lrsa_lit", "lightning", "torch"})
"""Where the arguments of objects may come from."""


def check_path(key: str, path: object) -> str:
    """Refuse a path into Python's standard library, which has no class for a setting, before anything is imported.

    Raises:
        UserError: it is such a path, or none at all.
    """
    if not isinstance(path, str) or _root(path) in sys.stdlib_module_names:
        raise UserError(f"{key}: class_path {path!r} is not allowed; it must name a class for this setting")
    return path


def check_paths(key: str, value: Any) -> None:
    """Apply :func:`check_path` to every ``class_path`` within settings that are just read from a file."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if name == "class_path":
            check_path(key, item)
        check_paths(f"{key}.{name}".lstrip("."), item)


def named_class(key: str, path: object, kinds: Kinds, within: str | None = None) -> type:
    """The class that a ``class_path`` names.

    Args:
        key: the setting, for errors.
        path: what it names; its module is imported.
        kinds: the class must be a subclass of one of these.
        within: where it is an argument of another object, the path of that object's class: then it may also be any
            class of its package, or of lrsa_lit, Lightning and PyTorch.

    Raises:
        UserError: it is no class that is allowed there.
    """
    path = check_path(key, path)
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{key}: class_path {path!r} cannot be imported") from None
    roots = _LIBRARIES | {_root(within)} if within is not None else frozenset()
    if inspect.isclass(found) and (issubclass(found, kinds) or _root(found.__module__) in roots):
        return found
    expected = f"a subclass of {' or '.join(kind.__name__ for kind in kinds[:3])}" if within is None else "a class"
    raise UserError(f"{key}: class_path {path!r} is not allowed; it must be {expected}")


def check_classes(key: str, value: Any, kinds: Kinds, slots: Mapping[str, Kinds], within: str | None = "") -> None:
    """Check all classes and functions in settings, before any of them is called.

    Args:
        key: the dotted name of ``value``.
        value: settings as a parser left them: its types have been checked, but not where a type is ``Any``.
        kinds: what settings make objects of.
        slots: stricter kinds of the objects within some settings, by dotted name.
        within: the class that ``value`` is given to.

    Raises:
        UserError: something there is no class that is allowed, or a function of Python's standard library.
    """
    if key in slots:
        kinds, within = slots[key], None
    if isinstance(value, Mapping):
        if "class_path" in value:
            within = named_class(key, value["class_path"], kinds, within).__module__
        for name, item in value.items():
            check_classes(f"{key}.{name}".lstrip("."), item, kinds, slots, within)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_classes(f"{key}.{number}", item, kinds, slots, within)
    elif inspect.isroutine(value) or inspect.isclass(value):
        check_path(key, f"{getattr(value, '__module__', None) or 'builtins'}.{value.__qualname__}")


def _root(path: str) -> str:
    return path.partition(".")[0]
