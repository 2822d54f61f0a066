"""What is private to Lightning is used in one file alone, and the installed Lightning has it."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import lightning
import pytest
from lightning.fabric.utilities import cloud_io
from lightning.pytorch import cli, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core import module
from lightning.pytorch.loops import fit_loop, training_epoch_loop
from lightning.pytorch.strategies import model_parallel
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.utilities import combined_loader

import lrsa_lit
from lrsa_lit import lightning_internals

PACKAGE = Path(lrsa_lit.__file__).parent
ALLOWED = Path(lightning_internals.__file__)
OWN = re.compile(r"(?:self\.|def )(_[a-z]\w*)")


def sources():
    return [path for path in PACKAGE.rglob("*.py") if path != ALLOWED]


def private(name):
    return name.startswith("_") and not name.startswith("__")


def uses_lightning(tree):
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    return any(module.partition(".")[0] == "lightning" for module in modules)


def of_lightning(base):
    """Names that a class of Lightning and its bases keep to themselves, as methods and as attributes of objects."""
    own = [kind for kind in base.__mro__ if kind.__module__.partition(".")[0] in ("lightning", "jsonargparse")]
    return {name for kind in own for name in OWN.findall(inspect.getsource(kind))}


def test_no_private_module_or_name_is_imported():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lightning":
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if private(name)], path


def test_no_private_attribute_of_another_object_is_asked_for():
    root = Path(lightning.__file__).parent
    names = {name for path in root.rglob("*.py") for name in OWN.findall(path.read_text(encoding="utf-8"))}
    assert {"_should_accumulate", "_accelerator_connector", "_batches_that_stepped"} <= names
    for path in sources():
        text = path.read_text(encoding="utf-8")
        own = set(OWN.findall(text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in names - own:
                of = ast.unparse(node.value)
                assert of in ("self", "cls", "super()"), f"{path}:{node.lineno} asks {of} for {node.attr}"


def classes_over_lightning():
    modules = [
        importlib.import_module(".".join(("lrsa_lit", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for path in sources()
        if uses_lightning(ast.parse(path.read_text(encoding="utf-8")))
    ]
    found = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    return sorted((kind for kind in found if kind.__module__.startswith("lrsa_lit.")), key=lambda kind: kind.__name__)


def test_no_class_overrides_or_asks_for_what_its_base_of_lightning_keeps_to_itself():
    classes = [kind for kind in classes_over_lightning() if kind.__module__ != "lrsa_lit.lightning_internals"]
    assert {"SafeModelCheckpoint", "LRSACLI", "FullySharded"} <= {kind.__name__ for kind in classes}
    for kind in classes:
        used = set(re.findall(r"(?:self\.|super\(\)\.|def )(_[a-z]\w*)", inspect.getsource(kind)))
        for base in kind.__mro__[1:]:
            if base.__module__.partition(".")[0] == "lightning":
                assert not used & of_lightning(base), (kind, base)


USED = {
    cloud_io: ["_is_local_file_protocol"],
    training_epoch_loop: ["_should_accumulate", "_should_check_val_fx", "_batches_that_stepped"],
    fit_loop: ["_data_fetcher", "_combined_loader", "_combined_loader_states_to_load", "_load_combined_loader_states"],
    combined_loader: ["_iterator", "_load_state_dicts"],
    trainer.trainer: ["_accelerator_connector"],
    module: ["_trainer"],
    accelerator_connector: ["use_distributed_sampler"],
    model_parallel: ["_data_parallel_size"],
}
"""Modules, and what is used of their objects."""


@pytest.mark.parametrize(("source", "names"), USED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_installed_lightning_has_what_is_used(source, names):
    text = inspect.getsource(source)
    for name in names:
        assert re.search(rf"\b{name}\b", text), f"lightning {lightning.__version__} has no {name}"


@pytest.mark.parametrize(
    ("ours", "base"),
    [(lightning_internals.OpenModelCheckpoint, ModelCheckpoint), (lightning_internals.OpenCLI, cli.LightningCLI)],
)
def test_the_installed_lightning_has_what_is_overridden(ours, base):
    used = set(re.findall(rf"(?:self\.|super\(\)\.|{base.__name__}\.|def )(_[a-z]\w*)", inspect.getsource(ours)))
    assert used <= of_lightning(base)
    for name in used & set(vars(ours)):
        parameters = [list(inspect.signature(vars(kind)[name]).parameters) for kind in (ours, base)]
        assert parameters[0] == parameters[1], name


def test_the_keys_of_a_loop_s_state_are_those_that_are_read():
    state = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).fit_loop.state_dict()
    for key in (lightning_internals.BATCHES, lightning_internals.VALIDATED):
        assert {"total", "current"} <= state[key].keys()
    assert "_batches_that_stepped" in state[lightning_internals.LOGGED]


def test_the_versions_are_those_that_the_package_admits():
    lowest, newest = lightning_internals.CHECKED_WITH
    assert lowest.split(".")[:2] == newest.split(".")[:2] == lightning.__version__.split(".")[:2]
