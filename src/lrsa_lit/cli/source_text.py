"""Classes and their settings, read from source text: importing them would take seconds because of PyTorch.

This reads class definitions, the imports that lead to them, fields of dataclasses, arguments of constructors and the
``Args`` of docstrings. A test checks that the result agrees with the classes themselves.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

_ARGUMENT = re.compile(r"^ {4}(\w+): ", re.MULTILINE)
_SECTION = re.compile(r"^(?:Args|Attributes|Raises|Returns|Example|Note)s?:\s*$", re.MULTILINE)


class Setting(NamedTuple):
    """An argument of a class: its annotation and default as source text, and its description in the docstring.

    The default is None if the argument is required.
    """

    kind: str
    default: str | None
    about: str


class Found(NamedTuple):
    """A class, and the module that defines it."""

    module: str
    node: ast.ClassDef

    @property
    def about(self) -> str:
        """The docstring up to its first section."""
        return _SECTION.split(inspect.cleandoc(ast.get_docstring(self.node) or ""))[0].strip()

    @property
    def line(self) -> str:
        """The docstring's first line."""
        return self.about.partition("\n")[0]


@functools.cache
def _file(module: str) -> Path | None:
    top, *rest = module.split(".")
    # Find only the outermost package: to find an inner one, Python would import the outer ones.
    spec = importlib.util.find_spec(top)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        package = Path(root, *rest)
        for file in (package / "__init__.py", *([package.with_suffix(".py")] if rest else [])):
            if file.is_file():
                return file
    return None


@functools.cache
def _parsed(module: str) -> ast.Module:
    file = _file(module)
    return ast.parse(file.read_text(encoding="utf-8") if file else "")


@functools.cache
def _definitions(module: str) -> Mapping[str, ast.ClassDef | str]:
    """The classes that a module defines, and the dotted names of what it imports, by name."""
    found: dict[str, ast.ClassDef | str] = {}
    for node in _statements(_parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ClassDef):
            found[node.name] = node
    return found


def _statements(block: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, also within ``if`` and ``try``. A walk through all expressions takes far longer."""
    for part in ("body", "handlers", "orelse", "finalbody"):
        for node in getattr(block, part, ()):
            yield node
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _statements(node)


@functools.cache
def exported(module: str) -> tuple[str, ...]:
    """What a module exports: ``__all__``, or if that is computed its imports from submodules, or else its classes."""
    for node in _parsed(module).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
            and isinstance(node.value, ast.List)
        ):
            return tuple(ast.literal_eval(node.value))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(name for name, what in _definitions(module).items() if str(what).startswith(f"{module}."))
    return tuple(name for name, what in _definitions(module).items() if isinstance(what, ast.ClassDef))


@functools.cache
def find(path: str) -> Found | None:
    """The class of a dotted name, wherever it is imported from; None if the source has no such class."""
    module, _, name = path.rpartition(".")
    what = _definitions(module).get(name) if module else None
    return find(what) if isinstance(what, str) and what != path else Found(module, what) if what else None  # type: ignore[arg-type]


@functools.cache
def lineage(path: str) -> tuple[Found, ...]:
    """A class and its bases, nearest first, as far as their source can be read."""
    found = find(path)
    if found is None:
        return ()
    parts: list[Found] = []
    for base in found.node.bases:
        name = ast.unparse(base)
        here = _definitions(found.module).get(name)
        parts += lineage(here if isinstance(here, str) else f"{found.module}.{name}")
    # A base that several bases have in common comes after all of them.
    return (found, *(part for position, part in enumerate(parts) if part not in parts[position + 1 :]))


def bases(path: str) -> set[str]:
    """Names of all bases of a class, including those that cannot be read."""
    return {ast.unparse(base) for found in lineage(path) for base in found.node.bases}


def is_abstract(path: str) -> bool:
    """Whether a class has abstract methods."""
    missing: dict[str, bool] = {}
    for found in lineage(path):
        for node in found.node.body:
            for name in _defined(node):
                decorators = getattr(node, "decorator_list", [])
                missing.setdefault(name, any("abstract" in ast.unparse(each) for each in decorators))
    return any(missing.values())


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@functools.cache
def settings(path: str) -> Mapping[str, Setting]:
    """The arguments of a class by name, inherited ones after its own."""
    return MappingProxyType(_settings(lineage(path)))


def _settings(line: tuple[Found, ...]) -> dict[str, Setting]:
    about: dict[str, str] = {}
    for found in line:
        made = _method(found.node, "__init__")
        about = (_described(made) if made else {}) | _described(found.node) | about
    for position, found in enumerate(line):
        if _is_dataclass(found.node):
            lines = [each for each in reversed(line[position:]) if _is_dataclass(each.node)]
            return {name: each for part in lines for name, each in _fields(part, about)}
        if (node := _method(found.node, "__init__")) is not None:
            own = dict(_parameters(found.module, node, about))
            if node.args.kwarg is None:
                return own
            hidden = own.keys() | _handed_on(node)
            inherited = _settings(line[position + 1 :]).items()
            return own | {name: each for name, each in inherited if name not in hidden}
    return {}


def parameters(path: str, method: str) -> dict[str, Setting]:
    """The arguments of a method, which the class or one of its bases defines."""
    for found in lineage(path):
        if (node := _method(found.node, method)) is not None:
            return dict(_parameters(found.module, node, _described(node)))
    return {}


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name), None)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def _fields(found: Found, about: Mapping[str, str]) -> Iterator[tuple[str, Setting]]:
    for item in found.node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            kind, default = _written(found.module, item.annotation), _written(found.module, item.value)
            if kind and "ClassVar" not in kind and "init=False" not in str(default):
                made = re.search(r"\bdefault(?:_factory)?=([^,()]+)", default or "")
                yield item.target.id, Setting(kind, made[1] if made else default, about.get(item.target.id, ""))


def _parameters(module: str, node: ast.FunctionDef, about: Mapping[str, str]) -> Iterator[tuple[str, Setting]]:
    positional = node.args.args[1:]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(node.args.defaults))
    defaults = [*missing, *node.args.defaults, *node.args.kw_defaults]
    for argument, default in zip([*positional, *node.args.kwonlyargs], defaults, strict=True):
        kind, written = _written(module, argument.annotation) or "", _written(module, default)
        yield argument.arg, Setting(kind, written, about.get(argument.arg, ""))


def _written(module: str, node: ast.expr | None) -> str | None:
    """The source text of an expression; for a module's constant, of its value."""
    if isinstance(node, ast.Name):
        what = _definitions(module).get(node.id)
        if isinstance(what, str) and what.startswith("lrsa_lit."):
            home, _, name = what.rpartition(".")
            return _written(home, ast.Name(name))
        node = _constants(module).get(node.id, node)
    return None if node is None else ast.unparse(node)


@functools.cache
def _constants(module: str) -> Mapping[str, ast.expr]:
    named = (node for node in _parsed(module).body if isinstance(node, ast.Assign) and len(node.targets) == 1)
    return {node.targets[0].id: node.value for node in named if isinstance(node.targets[0], ast.Name)}


def _handed_on(node: ast.FunctionDef) -> set[str]:
    """Arguments that a constructor itself passes to its base, so that they cannot be set any more."""
    calls = (each for each in ast.walk(node) if isinstance(each, ast.Call))
    given = {
        keyword.arg
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"
        for keyword in call.keywords
    }
    return {name for name in given if name}


def _described(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """The description of each argument in the ``Args`` of a docstring."""
    _, _, rest = inspect.cleandoc(ast.get_docstring(node) or "").partition("Args:\n")
    parts = _ARGUMENT.split(_SECTION.split(rest)[0])[1:]
    return {name: " ".join(about.split()) for name, about in zip(parts[::2], parts[1::2], strict=True)}
