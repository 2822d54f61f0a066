"""A checkpoint whose parts have another form than a fit writes is refused before Lightning reads it."""

import copy

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal
from helpers import refused
from torch import nn

from lrsa_lit.checkpoints.form import check_form, check_optimizer
from lrsa_lit.cli.main import main

DELETED = object()


def change(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    if value is DELETED:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


TREE = {"count": 3, "rate": 0.5, "done": True, "name": "x", "score": torch.zeros(2), "parts": [{"a": 1}], "any": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 3.5),
        ("count", 10**30),
        ("rate", "x"),
        ("done", 1),
        ("name", None),
        ("score", torch.zeros(3)),
        ("score", 1.0),
        ("parts", []),
        ("parts", [3]),
        ("parts", [{}]),
    ],
)
def test_another_form_is_named(name, value):
    check_form(copy.deepcopy(TREE), TREE, "part")
    with refused("ckpt_path", reason=f"part.{name}"):
        check_form(TREE | {name: value}, TREE, "part")
    with refused("ckpt_path", reason=f"part.{name}"):
        check_form({key: held for key, held in TREE.items() if key != name}, TREE, "part")


def test_more_keys_numbers_of_another_kind_and_what_is_not_known_are_no_matter():
    check_form(TREE | {"more": 1, "rate": 1, "any": "x", "score": torch.zeros(2, dtype=torch.float64)}, TREE, "part")
    check_form({"a": {"b": 1}, "c": [1, 2]}, {"a": {}, "c": []}, "part")


OPTIMIZERS = {
    "Adam": lambda weights: torch.optim.AdamW(weights, lr=0.1),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights, lr=0.1),
    "without a state": lambda weights: torch.optim.SGD(weights, lr=0.1),
}


def stepped(make):
    """The weights, a new optimizer's state and the same after a step."""
    weights = [nn.Parameter(torch.ones(*shape)) for shape in ((3, 4), (4,), (2, 3), (3,))]
    optimizer = make(weights)
    new = optimizer.state_dict()
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()
    return weights, new, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_an_optimizer_has_saved_is_its_form(make):
    weights, new, state = stepped(make)
    check_optimizer(state, new, weights, "part")


CHANGES = {
    "state": (["state"], DELETED),
    "no groups": (["param_groups"], []),
    "rate": (["param_groups", 0, "lr"], "x"),
    "weights": (["param_groups", 0, "params"], [0, 1, 2, 2]),
    "entry": (["state", 1], 3),
    "entry of no weight": (["state", 9], {}),
    "moment": (["state", 2, "exp_avg"], DELETED),
    "moment of a type": (["state", 3, "exp_avg"], 1.0),
    "moment of a shape": (["state", 2, "exp_avg"], torch.zeros(3, 2)),
}


@pytest.mark.parametrize(("path", "value"), CHANGES.values(), ids=CHANGES)
def test_what_an_optimizer_has_not_saved(path, value):
    weights, new, state = stepped(OPTIMIZERS["Adam"])
    change(state, path, value)
    with refused("ckpt_path", reason="part"):
        check_optimizer(state, new, weights, "part")


SHORT = ["--validate_first", "false", "--model.max_new_tokens", "1", "--model.lr_scheduler", "null"]
SHORT += ["--data.init_args.limit", "{train: 2, val: 1, test: 1}", "--trainer.val_check_interval", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What a fit of the debug config has saved."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LRSA_CACHE_DIR", str(folder / "cache"))
        main(["fit", *DEBUG, *NO_LOGGER, *SHORT, "--trainer.max_steps", "1"])
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=True)


GROUP = ["optimizer_states", 0, "param_groups", 0]


@pytest.mark.parametrize(
    ("command", "path", "value"),
    [
        ("fit", ["pytorch-lightning_version"], "x"),
        ("fit", ["lr_schedulers"], [3]),
        ("predict", ["lr_schedulers"], "x"),
        ("test", ["state_dict", "model.lm_head.weight"], [1]),
        ("fit", ["loops", "fit_loop", "epoch_progress"], 1),
        ("fit", ["loops", "fit_loop"], DELETED),
        ("fit", ["optimizer_states"], DELETED),
        ("fit", [*GROUP, "lr"], {}),
        ("fit", ["optimizer_states", 0, "state", 0, "exp_avg"], DELETED),
        ("test", ["callbacks", "FitSummary"], 1),
        ("test", ["callbacks", "FitSummary", "history"], [3]),
        ("test", ["callbacks", "FitSummary", "losses"], {"kl": [[1.0], 2.0]}),
        ("test", ["callbacks", "FitSummary", "losses"], {"kl": [[1.0], ["x"]]}),
        ("fit", ["exact_state", "random", 0, "numpy", 0], "x"),
        ("fit", ["exact_state", "loaders", 0, 0, "epoch"], DELETED),
        ("fit", ["exact_state", "loaders"], []),
    ],
)
def test_checkpoints_of_another_form_are_one_line(command, path, value, checkpoint, tmp_path, capfd):
    changed = copy.deepcopy(checkpoint)
    change(changed, path, value)
    torch.save(changed, tmp_path / "x.ckpt")
    error = refusal(capfd, command, *DEBUG, *NO_LOGGER, *SHORT, "--ckpt_path", "x.ckpt")
    assert error.startswith("ckpt_path: ")
    assert str(path[0]) in error or "training data" in error
