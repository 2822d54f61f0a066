"""Imports go the way that docs/architecture.md draws: downwards alone, and never in a circle, not even for types.

Files are of a size that can be read, each has a name of its own, and the package itself costs next to nothing.
"""

import ast
import collections
import graphlib
import re
import statistics
from pathlib import Path

import pytest
from helpers import modules_after

import lrsa_lit

SOURCE = Path(lrsa_lit.__file__).parent
TABLE = Path(__file__).parents[1] / "docs/architecture.md"


def rows():
    """For each row of the table its packages, and what it says that they may import."""
    lines = [line.split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [(re.findall(r"`(\w+)`", first) or [first.strip()], last) for _, first, _, last, _ in lines[1:]]


def allowed():
    """For each package the ones that it may import; foundation stands for all modules that are in no package."""
    table, found = rows(), {}
    for number, (packages, text) in enumerate(table):
        start = number + 1
        if named := re.search(r"`(\w+)` and below", text):
            start = next(other for other, (names, _) in enumerate(table) if named[1] in names)
        elif text.strip().startswith("foundation"):
            start = len(table) - 1
        below = {name for names, _ in table[start:] for name in names}
        for package in packages:
            found[package] = below | {"foundation", *packages}
    return found


def name_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(("lrsa_lit", *parts)).removesuffix(".__init__")


FILES = {name_of(path): path for path in SOURCE.rglob("*.py")}


def imports(name):
    """The modules of this package that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each if each in FILES else node.module for each in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys() - {name, "lrsa_lit"}


def package_of(name, packages):
    top = name.split(".")[1]
    # What `python -m lrsa_lit` runs is the command line.
    return top if top in packages else "cli" if top == "__main__" else "foundation"


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"lrsa_lit"}))
def test_nothing_is_imported_from_above(name):
    rules = allowed()
    may = rules[package_of(name, rules)]
    upwards = {other for other in imports(name) if package_of(other, rules) not in may}
    assert not upwards, f"{name} may import {sorted(may)}"


def test_nothing_is_imported_in_a_circle():
    graphlib.TopologicalSorter({name: imports(name) for name in FILES}).prepare()


def test_each_package_and_module_is_in_the_table():
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == {name for names, _ in rows() for name in names} & packages
    assert {name for names, _ in rows()[:-1] for name in names} <= packages | {"strategies"}
    foundation = TABLE.read_text(encoding="utf-8").partition("\n| foundation |")[2].partition("\n")[0]
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__", "strategies"}
    assert modules == set(re.findall(r"`(\w+)`", foundation))


@pytest.mark.parametrize(
    ("package", "library"),
    [("ops", "transformers"), ("ops", "lightning"), ("attention", "lightning"), ("data", "peft")],
)
def test_libraries_that_a_package_does_without(package, library):
    own = re.compile(rf"^\s*(?:from|import) (?:{library}\b|lrsa_lit\.{library}_)", re.MULTILINE)
    assert not [name for name, path in FILES.items() if f".{package}." in name and own.search(path.read_text())]


COMMANDS = {"cache.py", "study.py", "sweep.py"}
"""The command line finds a command's module by the command's name."""


def test_a_file_name_stands_in_one_package():
    places = collections.defaultdict(list)
    for path in FILES.values():
        places[path.name].append(str(path.relative_to(SOURCE)))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice.keys() - {"__init__.py", "__main__.py", *COMMANDS}, twice


@pytest.mark.parametrize("package", sorted(name for name, path in FILES.items() if path.name == "__init__.py"))
def test_no_submodule_has_the_name_of_what_its_package_exports(package):
    exported = set()
    for node in ast.walk(ast.parse(FILES[package].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            exported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            exported.add(node.name)
    assert not exported & {name.rpartition(".")[2] for name in FILES if name.rpartition(".")[0] == package}


def test_files_can_be_read_at_one_sitting():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    assert not {
        str(path): count
        for path, count in lines.items()
        if count > (450 if path.parent.name in ("triton", "gluon") else 400)
    }
    assert statistics.median(lines.values()) <= 130


def test_importing_the_package_costs_next_to_nothing():
    added = modules_after("import lrsa_lit") - modules_after("import importlib, typing")
    assert "lrsa_lit" in added
    assert not added & {"torch", "lightning", "transformers", "numpy", "datasets", "mlflow", "triton"}
    assert len(added) < 30


def test_the_package_exports_its_public_api():
    from lrsa_lit import attention, errors
    from lrsa_lit.ops import sparse_attention as operator

    assert {"LRSACache", "LRSAConfig", "Rule", "UserError", "enable", "prefill"} <= set(lrsa_lit.__all__)
    for name in lrsa_lit.__all__:
        home = next(each for each in (attention, operator, errors) if hasattr(each, name))
        assert getattr(lrsa_lit, name) is getattr(home, name)


def test_no_script_hides_a_folder_of_tests():
    """Both are on the path of the tests, where a module wins over a folder of its name, which is then not found."""
    tests, benchmarks = Path(__file__).parent, Path(__file__).parents[1] / "benchmarks"
    imported = {
        node.module.partition(".")[0]
        for path in tests.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    folders = {name for name in imported if (tests / name).is_dir()}
    assert folders
    assert not folders & {path.stem for path in benchmarks.glob("*.py")}
