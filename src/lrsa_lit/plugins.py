"""Plugins: classes from modules that the user names, and from the entry points of installed packages.

Files never cause imports of user modules: a class named by a checkpoint or a config.json is looked up among known ones.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import keyword
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard

from lrsa_lit.errors import UserError, message_of


class Kind(NamedTuple):
    """A kind of plugin: its title in messages, the package that exports the shipped classes, and their base class."""

    title: str
    home: str
    base: str


KINDS = {
    "compressors": Kind("compressor", "lrsa_lit.ops.sparse_attention", "Compressor"),
    "data": Kind("data set", "lrsa_lit.data", "QADataModule"),
    "filters": Kind("context filter", "lrsa_lit.data.filters", "ContextFilter"),
    "systems": Kind("system", "lrsa_lit.systems", "System"),
    "objectives": Kind("objective", "lrsa_lit.objectives", "Objective"),
}
"""The kinds by name. Packages register a class as the entry point ``NAME = "module:NAME"`` of ``lrsa_lit.KIND``."""

_added: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


def names_of(value: object) -> list[str]:
    """The modules that a setting names, one or a list; those of Python's standard library are refused."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise UserError("plugins", value, "a list of modules, such as [my_package]")
    for name in names:
        if not _is_module_name(name):
            raise UserError("plugins", name, "one of your modules, such as my_package")
    return list(dict.fromkeys(names))


def flags_of(modules: Iterable[str]) -> list[str]:
    """The arguments with which a command imports these modules."""
    return [part for name in modules for part in ("--plugins", name)]


def load(modules: Iterable[str] = (), kinds: Iterable[str] = tuple(KINDS)) -> None:
    """Register the classes of modules that the user names, and those of ``kinds`` from installed packages.

    Raises:
        UserError: a module cannot be imported, or a class has the name of another one.
    """
    for name in names_of(list(modules)):
        module = _imported(name, name)
        for kind in KINDS:
            for found in _classes_in(module, kind):
                _add(kind, found, name)
    for kind in kinds:
        for point in points(kind):
            origin = f"{point.value} of {point.dist.name if point.dist else 'a package'}"
            named = getattr(_imported(point.module, origin), point.attr, None)
            if not _is_of(named, kind) or named.__name__ != point.name:
                raise UserError("plugins", reason=f"{origin} is not a {KINDS[kind].title} named {point.name}")
            _add(kind, named, origin)


def points(kind: str) -> metadata.EntryPoints:
    """The entry points by which installed packages register classes of a kind."""
    folders = [Path(folder).absolute() for folder in sys.path]
    state = tuple((folder, folder.stat().st_mtime_ns) for folder in folders if folder.is_dir())
    found: metadata.EntryPoints = _points(state).select(group=f"lrsa_lit.{kind}")
    return found


@functools.lru_cache(maxsize=1)
def _points(_: tuple[tuple[Path, int], ...]) -> Any:
    """All entry points; their type depends on the version of Python, and has ``select``.

    A file of each package is read, so only after the folders of ``sys.path`` have changed.
    """
    return metadata.entry_points()


def registered(kind: str) -> dict[str, type]:
    """The classes of a kind by name: the shipped ones, then those added by :func:`load`."""
    home = importlib.import_module(KINDS[kind].home)
    return {found.__name__: found for found in _classes_in(home, kind)} | _added[kind]


def added(kind: str) -> dict[str, type]:
    """The classes of a kind that :func:`load` added, by name."""
    return dict(_added[kind])


def find(kind: str, path: object, key: str) -> type:
    """The class that a file names, if it is imported or registered by an installed package.

    The path may be a full path, or only the name of a shipped class, a class of a loaded module, or a registered one.

    Raises:
        UserError: the class is unknown; the message names the ``key`` in the file and how to load the class.
    """
    home = importlib.import_module(KINDS[kind].home)
    base = getattr(home, KINDS[kind].base)
    module, _, name = str(path).rpartition(".")
    if f"{module}.".startswith(f"{home.__name__}.") and name in (shipped := registered(kind)):
        # Its module within the package may have changed since the file was written.
        return shipped[name]
    for look_again in (True, False):
        if isinstance(path, str) and path in (by_name := registered(kind)):
            return by_name[path]
        for known in _subclasses(base):
            if path == f"{known.__module__}.{known.__qualname__}" and not inspect.isabstract(known):
                return known
        if look_again:
            load(kinds=[kind])
    if isinstance(path, str) and not module:
        raise UserError(key, path, f"a {KINDS[kind].base}: {', '.join(sorted(registered(kind)))}")
    hint = f"; load it by --plugins {module} (in YAML, plugins: [{module}])" if _is_module_name(module) else ""
    raise UserError(key, path, reason=f"is not a known {KINDS[kind].title}{hint}")


def _is_module_name(name: object) -> bool:
    parts = name.split(".") if isinstance(name, str) else [""]
    written = all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    return written and parts[0] not in sys.stdlib_module_names


def _imported(name: str, origin: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    # Foreign code can raise anything.
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {message_of(error)}".removesuffix(": ")
        hint = "; install it, or add its folder to PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError("plugins", reason=f"{origin} cannot be imported ({what}){hint}") from error


def _add(kind: str, found: type, origin: str) -> None:
    other = registered(kind).get(found.__name__, found)
    where = f"{other.__module__}.{other.__qualname__}"
    # A module that was imported again, as in a notebook, defines the same class again.
    if where != f"{found.__module__}.{found.__qualname__}":
        both = f"both {origin} and {where} define the {KINDS[kind].title} {found.__name__}"
        raise UserError("plugins", reason=f"{both}; rename one of them")
    _added[kind][found.__name__] = found


def _classes_in(module: ModuleType, kind: str) -> Iterator[type]:
    """The public, non-abstract classes of a kind that a module exports and its package defines."""
    package = module.__name__.partition(".")[0]
    for name in getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]:
        found = getattr(module, name, None)
        if _is_of(found, kind) and found.__module__.partition(".")[0] == package:
            yield found


def _is_of(found: object, kind: str) -> TypeGuard[type]:
    """Whether it is a non-abstract class of a kind, judged by names, because the base may not have been imported."""
    if not inspect.isclass(found) or inspect.isabstract(found):
        return False
    home, base = KINDS[kind].home, KINDS[kind].base
    return any(each.__name__ == base and f"{each.__module__}.".startswith(f"{home}.") for each in found.__mro__[1:])


def _subclasses(base: type[object]) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)
