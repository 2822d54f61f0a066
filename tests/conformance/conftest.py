"""What every class of a kind must hold to: the shipped ones, the worked examples of docs/extending.md, and your own.

``pytest tests/conformance --plugins my_package`` adds the classes of a module, and
``--init-args '{MyData: {source: my.jsonl}}'`` gives the arguments that they cannot do without.
"""

import atexit
import copy
import functools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_files import FILES
from filter_files import FILTER_FILES
from jsonargparse import ArgumentParser
from plugin_helpers import write_examples

from lrsa_lit import plugins
from lrsa_lit.objectives import Objective

# Of the classes that are shipped or shown: what their defaults would leave untested, or a first file to read.
INIT_ARGS: dict[str, dict[str, Any]] = {
    "ChunkWise": {"size": 3},
    "QueryAttention": {"window": 3, "kernel": 3},
    "QueryRuns": {"window": 2, "size": 3, "shared_heads": True},
    "StraightThrough": {"of": {"class_path": "RandomTokens"}, "by": "LagRelative", "temperature": 0.5},
    "LanguageModelLoss": {"share": 0.5},
    "Distillation": {"positions": 30},
    "HiddenAlignment": {"positions": 9},
    "AdaKV": {"scorer": {"class_path": "ExpectedAttention", "init_args": {"sink_size": 2, "future": 8}}},
    "Cascade": {"window": 4, "caches": 2, "sink_size": 2, "stride": 5},
    "ChunkKV": {"size": 4, "window": 3, "reuse": 2},
    "ChunkKVPress": {"size": 4, "scorer": {"class_path": "lrsa_lit.systems.KeyDiff"}},
    "DuoAttention": {"gates": [[0.9, 0.1], [0.2, 0.8]], "sink_size": 2, "recent": 5},
    "ExpectedAttention": {"sink_size": 2, "future": 8},
    "FreqKV": {"capacity": 12, "sink_size": 2},
    "KVzip": {"sink_size": 2, "chunk": 9},
    "KeyDiffBlocks": {"pairs": 8, "block": 3},
    "LagKVPress": {"sink_size": 2, "lag_size": 4},
    "SnapKV": {"window": 3},
    "SparseAccelerate": {"initial": 2, "local": 4, "columns": 3, "diagonals": 5, "last_queries": 4, "blocks": 1},
    "SqueezedAttention": {"observed": 4, "clusters": 0.3},
    "StreamingLLM": {"sink_size": 2},
}
_WEIGHTS = {"AnswerLoss": 1.0, "Distillation": 0.7, "HiddenAlignment": 2.0, "LanguageModelLoss": 0.3, "OddsRatio": 0.5}
INIT_ARGS["Sum"] = {
    "objectives": [
        {"class_path": f"lrsa_lit.objectives.{name}", "init_args": {"weight": weight} | INIT_ARGS.get(name, {})}
        for name, weight in _WEIGHTS.items()
    ]
}
FIXTURES = {
    "compressors": "compressor",
    "data": "make",
    "filters": "context_filter",
    "objectives": "objective_settings",
    "systems": "system",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plugins", dest="own_plugins", action="append", default=[], help="modules whose classes are tested, too"
    )
    parser.addoption("--init-args", default="{}", help="YAML: arguments of classes by name")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind, fixture in FIXTURES.items():
        if fixture in metafunc.fixturenames:
            found = registered(metafunc.config, kind)
            metafunc.parametrize(fixture, found.values(), ids=found.keys(), indirect=True, scope="module")


def registered(config: pytest.Config, kind: str) -> dict[str, tuple[type, dict[str, Any]]]:
    """The classes of a kind, those of the modules and of the worked examples among them, and their arguments."""
    plugins.load([*examples(), *config.getoption("own_plugins", [])])
    given = INIT_ARGS | yaml.safe_load(config.getoption("--init-args", "{}"))
    return {name: (found, given.get(name, {})) for name, found in plugins.registered(kind).items()}


@functools.cache
def examples() -> list[str]:
    """The names of the worked examples, which can be imported from then on."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.path.append(str(folder))
    return list(write_examples(folder))


def files_of(cls: type, folder: Path) -> dict[str, Any]:
    """Files for a data set, written into a folder, as its arguments."""
    return FILES[cls.__name__](folder) if cls.__name__ in FILES else {}


@pytest.fixture
def data_sets(request, tmp_path):
    """All data sets and their arguments, but for those that take others."""
    found = []
    for name, (cls, init_args) in registered(request.config, "data").items():
        (tmp_path / name).mkdir()
        init_args = files_of(cls, tmp_path / name) | init_args
        if "data_sets" not in init_args:
            found.append((cls, init_args))
    return found


@pytest.fixture(scope="module")
def compressor(request):
    cls, init_args = request.param
    return cls(**init_args)


@pytest.fixture(scope="module")
def system(request):
    cls, init_args = request.param
    return cls(**init_args)


@pytest.fixture(scope="module")
def context_filter(request, tmp_path_factory):
    cls, init_args = request.param
    files = FILTER_FILES[cls.__name__](tmp_path_factory.mktemp("files")) if cls.__name__ in FILTER_FILES else {}
    return cls(**files | init_args)


@pytest.fixture(scope="module")
def make(request, tmp_path_factory):
    """Makes a data set of the class, each time a new one; ``make.files`` are those that it reads."""
    cls, init_args = request.param
    folder = tmp_path_factory.mktemp("files")
    init_args = files_of(cls, folder) | init_args

    def make(**options: Any) -> Any:
        # Data sets of a mixture keep what they were once handed.
        return cls(**{"max_tokens": 2048, **copy.deepcopy(init_args), **options})

    make.files = [path for path in folder.iterdir() if path.is_file()]
    return make


@pytest.fixture(scope="module")
def objective_settings(request):
    """Those of a fit with the objective; they name its module, unless it is shipped."""
    cls, init_args = request.param
    plugins = [] if cls.__module__.startswith("lrsa_lit.") else [cls.__module__]
    path = f"{cls.__module__}.{cls.__qualname__}"
    return {"plugins": plugins, "model": {"objective": {"class_path": path, "init_args": init_args}}}


@pytest.fixture(scope="module")
def objective(objective_settings):
    """As the command line makes it, objectives within it included."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(Objective, "objective")
    return parser.instantiate_classes(parser.parse_object(objective_settings["model"])).objective
