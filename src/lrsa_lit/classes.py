"""Check the classes that settings name by ``class_path``, so that a setting can only create objects of its kind."""

from __future__ import annotations

import contextlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lrsa_lit.errors import UserError

Kinds = tuple[type, ...]

_LIBRARIES = frozenset({"lightning", "torch"})
"""Libraries whose classes are allowed only by type, because creating some of them runs a command."""


def check_class_path(key: str, path: object) -> str:
    """Refuse a path into Python's standard library, which has no classes for settings, before importing anything."""
    if not isinstance(path, str) or _package(path) in sys.stdlib_module_names:
        raise UserError(f"{key}.class_path".lstrip("."), path, "the name of a class for this setting")
    return path


def check_class_paths(key: str, value: Any) -> None:
    """Apply :func:`check_class_path` to every ``class_path`` in settings that were read from a file."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if name == "class_path":
            check_class_path(key, item)
        check_class_paths(f"{key}.{name}".lstrip("."), item)


def named_class(key: str, path: object, kinds: Kinds, owner: type | None = None) -> type:
    """The class that a ``class_path`` names.

    Args:
        key: the setting, for errors.
        path: the class path, whose module is imported. For a subclass of ``kinds``, its name is enough.
        kinds: the class must be a subclass of one of these.
        owner: the class that takes the object as an argument. Other classes of its package are allowed as well, except
            for Lightning and PyTorch.

    Raises:
        UserError: it is not a class, or the class is not allowed there.
    """
    path = check_class_path(key, path)
    for known in _subclasses(kinds) if "." not in path else ():
        if known.__name__ == path:
            return known
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{key}.class_path".lstrip("."), path, reason="cannot be imported") from None
    package = None if owner is None else _package(owner.__module__)
    if inspect.isclass(found):
        beside = package not in _LIBRARIES and _package(found.__module__) == package
        if beside or _is_any_of(found, kinds):
            return found
    few = " or ".join(kind.__name__ for kind in kinds)
    allowed = f"a subclass of {few}" if len(kinds) <= 3 else "a class for this setting"
    raise UserError(f"{key}.class_path".lstrip("."), path, allowed)


def argument_kinds(owner: type, name: str) -> Kinds:
    """The classes in the annotation of a constructor's argument, including those in unions and containers."""
    for base in owner.__mro__:
        try:
            hints = typing.get_type_hints(vars(base)["__init__"])
        except Exception:
            # The class has no own __init__, or annotations with names that only a type checker imports.
            continue
        if name in hints:
            return tuple(_classes(hints[name]))
    return ()


def check_classes(key: str, value: Any, kinds: Kinds, slots: Mapping[str, Kinds], owner: type | None = None) -> None:
    """Check all classes and functions in settings, before any of them is called.

    Args:
        key: the dotted name of ``value``.
        value: parsed settings; the parser does not check types that are ``Any``.
        kinds: the allowed classes; arguments may also be of the classes in their annotations.
        slots: stricter kinds for some settings, by dotted name.
        owner: the class that takes ``value``, as in :func:`named_class`.

    Raises:
        UserError: a class is not allowed, or a function is from Python's standard library.
    """
    if key in slots:
        kinds, owner = slots[key], None
    if isinstance(value, Mapping):
        made = named_class(key, value["class_path"], kinds, owner) if "class_path" in value else None
        for name, item in value.items():
            inner = f"{key}.{name}".lstrip(".")
            if made is not None and name in ("init_args", "dict_kwargs") and isinstance(item, Mapping):
                for argument, given in item.items():
                    check_classes(f"{inner}.{argument}", given, (*kinds, *argument_kinds(made, argument)), slots, made)
            else:
                check_classes(inner, item, kinds, slots, owner)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_classes(f"{key}.{number}", item, kinds, slots, owner)
    elif inspect.isroutine(value) or inspect.isclass(value):
        check_class_path(key, f"{getattr(value, '__module__', None) or 'builtins'}.{value.__qualname__}")


def _classes(hint: Any) -> Iterator[type]:
    if parts := typing.get_args(hint):
        for part in parts:
            yield from _classes(part)
    # object and Callable are left out, because they would allow almost any class.
    elif inspect.isclass(hint) and hint not in (object, Callable):
        yield hint


def _subclasses(kinds: Iterable[type]) -> Iterator[type]:
    """All imported subclasses, recursively."""
    for kind in kinds:
        children: list[type] = type.__subclasses__(kind)
        for child in children:
            yield child
            yield from _subclasses([child])


def _is_any_of(found: type, kinds: Kinds) -> bool:
    for kind in kinds:
        # Protocols and typed dicts do not support issubclass.
        with contextlib.suppress(TypeError):
            if issubclass(found, kind):
                return True
    return False


def _package(path: str) -> str:
    return path.partition(".")[0]
