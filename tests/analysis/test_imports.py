"""Analysis looks at the rest, and of the rest only experiments, which stand above it, know of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lrsa_lit

PACKAGE = Path(lrsa_lit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """The parts of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("lrsa_lit.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if path.parent.name == "analysis":
        allowed = {"analysis", "ops", "attention", "models", "data", "store", "errors", "io", "names", "tracking"}
        allowed |= {"checkpoints", "evaluation", "terminal", "uris"}
        assert imported(path) <= allowed
    elif not {"experiments", "study"} & set(path.parts):
        assert "analysis" not in imported(path)
