"""``lrsa cache`` and ``lrsa env``."""

import importlib
import json
import os
import sys
import types

import pytest
import torch
from cli_helpers import refusal
from helpers import modules_after

from lrsa_lit import cache_contents, io, verified
from lrsa_lit.cli import env
from lrsa_lit.cli.main import main
from lrsa_lit.ops.sparse_attention import Choice, api
from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.paths import cache_dir

DAY = 86400


@pytest.fixture
def filled():
    """A cache with an entry of each kind, the sizes of its files in whole blocks of 4 KiB."""
    files = {
        "models/m-1-2/model.safetensors": 3,
        "data/QAFiles-12/train/examples.arrow": 2,
        "data/QAFiles-12/val/examples.arrow": 1,
        "data/QAFiles-12/teachers/k-8/logits.bin": 4,
        "data/TextFiles-34/train/examples.arrow": 1,
        "data/QAFiles-56.sources.json": 1,
        "hub/datasets/x.arrow": 1,
        "mine.txt": 1,
        "data/TextFiles-34/.val.01234567.partial/examples.arrow": 1,
    }
    for name, blocks in files.items():
        path = cache_dir(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(4096 * blocks))
    return cache_dir()


def listed(capfd):
    capfd.readouterr()
    main(["cache", "--json"])
    return {entry["name"]: entry for entry in json.loads(capfd.readouterr().out)["entries"]}


def test_the_list_names_each_entry_with_its_kind_and_size(filled, capfd):
    found = {name: (entry["kind"], round(entry["size"] / 4096)) for name, entry in listed(capfd).items()}
    assert found == {
        "models/m-1-2": ("models", 3),
        "data/QAFiles-12": ("data", 3),
        "data/TextFiles-34": ("data", 1),
        "data/QAFiles-12/teachers/k-8": ("teachers", 4),
        "data/*.sources.json": ("sources", 1),
        "hub": ("hub", 1),
        "data/TextFiles-34/.val.01234567.partial": ("unfinished", 1),
        "mine.txt": ("other", 1),
    }
    main(["cache"])
    out = capfd.readouterr().out
    assert all(name in out for name in found)
    assert f"8 entries, 60 KiB in {filled}" in out


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        (["models"], {"models/m-1-2"}),
        (["data/QAFiles-12"], {"data/QAFiles-12"}),
        (["data/*Files-*", "hub"], {"data/QAFiles-12", "data/TextFiles-34", "data/QAFiles-12/teachers/k-8", "hub",
                                   "data/TextFiles-34/.val.01234567.partial"}),
        (["teachers", "unfinished"], {"data/QAFiles-12/teachers/k-8", "data/TextFiles-34/.val.01234567.partial"}),
        (["data", "--dry-run"], set()),
        (["mine.txt"], {"mine.txt"}),
    ],
)  # fmt: skip
def test_clearing_removes_what_is_named_and_nothing_else(arguments, gone, filled, capfd):
    before = listed(capfd).keys()
    main(["cache", "clear", *arguments])
    assert listed(capfd).keys() == before - gone


def test_all_leaves_what_does_not_come_back(filled, capfd):
    main(["cache", "clear", "--all"])
    assert listed(capfd).keys() == {"data/QAFiles-12/teachers/k-8", "mine.txt"}
    main(["cache", "clear", "teachers"])
    assert not list(cache_dir("data").iterdir())


def test_only_old_entries(filled, capfd):
    for path in (cache_dir("hub"), *cache_dir("hub").rglob("*")):
        os.utime(path, (0, path.stat().st_mtime - 10 * DAY))
    before = listed(capfd).keys()
    main(["cache", "clear", "--all", "--older-than", "9.5"])
    assert listed(capfd).keys() == before - {"hub"}


def test_what_a_process_is_writing_stays(filled, capfd):
    with io.partial_folder(cache_dir("models/new")) as partial:
        (partial / "x").write_text("x")
        main(["cache", "clear", "unfinished"])
        assert f"models/{partial.name}" in listed(capfd)


def test_a_cleared_folder_is_made_again(filled, tmp_path):
    verified.build(cache_dir("models/m"), lambda folder: (folder / "x").write_text("x"))
    main(["cache", "clear", "models/m"])
    assert not cache_dir("models/m").exists()
    verified.build(cache_dir("models/m"), lambda folder: (folder / "x").write_text("x"))
    assert verified.damage(cache_dir("models/m")) is None


def test_no_cache_and_links(capfd, tmp_path):
    assert listed(capfd) == {}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("x")
    cache_dir("models").mkdir(parents=True)
    cache_dir("models/link").symlink_to(tmp_path / "elsewhere")
    main(["cache", "clear", "--all"])
    assert not cache_dir("models/link").is_symlink()
    assert (tmp_path / "elsewhere/mine").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["clear"], "NAME"),
        (["clear", "models", "--all"], "NAME"),
        (["clear", "model"], "'model'"),
        (["clear", "../x"], "'../x'"),
        (["list", "--all"], "--all"),
        (["--older-than", "3"], "--older-than"),
        (["clear", "--all", "--older-than", "-1"], "--older-than"),
        (["clear", "--all", "--older-than", "nan"], "--older-than"),
        (["clear", "--all", "--json"], "--json"),
        (["empty"], "empty"),
    ],
)
def test_mistakes_clear_nothing(arguments, named, filled, capfd):
    before = listed(capfd).keys()
    assert named in refusal(capfd, "cache", *arguments)
    assert listed(capfd).keys() == before


def test_what_may_not_be_removed_is_one_line(filled, capfd, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(io, "remove", fail)
    assert "models/m-1-2' cannot be removed (Permission denied)" in refusal(capfd, "cache", "clear", "models")


def test_the_list_needs_no_heavy_import():
    added = modules_after("from lrsa_lit.cli import cache")
    assert not added & {"torch", "lightning", "transformers", "datasets", "mlflow"}


def facts(capfd):
    capfd.readouterr()
    main(["env", "--json"])
    return json.loads(capfd.readouterr().out)


def test_env_names_versions_extras_and_caches(filled, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(filled.parent))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host/x")
    found = facts(capfd)
    assert found["packages"]["torch"] == torch.__version__
    assert found["extras"]["completion"] == "installed"
    assert found["folders"]["cache of lrsa"].startswith("~/cache: models 12 KiB, data 16 KiB, teachers 16 KiB")
    assert found["environment"]["MLFLOW_TRACKING_URI"] == "https://host/x"
    main(["env"])
    out = capfd.readouterr().out
    assert all(f"\n{section}\n" in f"\n{out}" for section in found)
    assert "secret" not in out


def test_an_extra_that_lacks_a_package_or_a_version(monkeypatch):
    lines = ["torch>=2", 'here>=3; extra == "one"', 'gone>=1; extra == "one"', 'lrsa-lit[one]; extra == "two"']

    def version(name):
        if name == "gone":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.5"

    monkeypatch.setattr(env.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(env.metadata, "version", version)
    monkeypatch.setattr(
        env.metadata, "metadata", lambda name: types.SimpleNamespace(get_all=lambda key: ["one", "two"])
    )
    extras = dict(env._extras())
    assert extras["one"] == "lacks here (2.5, needs >=3), gone (missing, needs >=1); pip install 'lrsa-lit[one]'"
    assert extras["two"].startswith("lacks here (2.5, needs >=3), gone")
    assert {name: text for name, (text, _) in env._requirements().items()} == {"torch": "2.5"}


def test_env_asks_the_operator_which_kernels_run(capfd, monkeypatch):
    assert facts(capfd)["kernels (impl=auto)"] == {"cpu": f"eager PyTorch; {choice_on_cpu().refusal}"}
    monkeypatch.setattr("lrsa_lit.ops.sparse_attention.choice", lambda *given: Choice("triton"))
    monkeypatch.setattr(hopper, "refusal", lambda device, dtype, dim: f"asked for {dim}" if dim == 64 else None)
    kernels = facts(capfd)["kernels (impl=auto)"]
    assert kernels["cpu float16, 64 channels"] == "Triton; asked for 64"
    assert kernels["cpu bfloat16, 128 channels"].startswith("Triton, and Gluon")


def choice_on_cpu():
    return api.choice("auto", "cpu", torch.float32, 64)


def test_the_choice_that_is_told_is_the_one_that_is_made(monkeypatch):
    """The operator's own decision is made of :func:`choice`, so that nothing can be told of it that is not so."""
    monkeypatch.setattr(api, "choice", lambda *given: Choice("triton"))
    api._decide.cache_clear()
    try:
        assert api._choose("auto", "cpu", torch.float32, 64) == "triton"
    finally:
        api._decide.cache_clear()


def test_env_tells_of_an_installation_that_is_broken(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = facts(capfd)
    assert "cannot be used: ModuleNotFoundError" in found["devices"]["torch"]
    assert "cannot be chosen" in found["kernels (impl=auto)"]["none"]
    assert found["packages"]["torch"]


def test_free_space_of_a_folder_that_is_not_there(tmp_path):
    assert cache_contents.free_space(tmp_path / "a/b/c") > 0
