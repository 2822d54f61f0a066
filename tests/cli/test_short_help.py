"""Help that shows the project's own first, and mistakes told before PyTorch is imported: all of it from source text."""

import ast
import dataclasses
import importlib
import pkgutil
import shlex
import subprocess
import sys

import jsonargparse
import lightning
import pytest
from cli_helpers import DEBUG, refusal
from helpers import modules_after

from lrsa_lit import plugins
from lrsa_lit.attention import LRSAConfig
from lrsa_lit.callbacks import show_next
from lrsa_lit.cli import catalogue, source_text
from lrsa_lit.cli.main import main
from lrsa_lit.models import Backbone, LoRA, RopeScaling
from lrsa_lit.tasks import LongContextQA

KINDS = (*plugins.KINDS, "callbacks")
CLASSES = [path for kind in KINDS for path in catalogue.named(kind).values()]
HEAVY = {"torch", "lightning", "transformers", "mlflow"}


def shown(capfd, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_the_classes_that_the_source_has_are_those_that_are_registered(kind):
    registered = {name for name in plugins.registered(kind) if name not in plugins.added(kind)}
    assert catalogue.named(kind).keys() == registered


def test_each_callback_of_the_project_is_listed_or_added_to_every_run():
    known = catalogue.named("callbacks").keys() | catalogue.EVERY_RUN_HAS
    for module in pkgutil.walk_packages(importlib.import_module("lrsa_lit").__path__, "lrsa_lit."):
        if module.name.split(".")[1] in ("callbacks", "tracking", "checkpoints", "analysis"):
            for name, found in vars(importlib.import_module(module.name)).items():
                own = isinstance(found, type) and found.__module__ == module.name and not name.startswith("_")
                assert not own or not issubclass(found, lightning.Callback) or name in known, name


@pytest.mark.parametrize("path", CLASSES, ids=lambda path: path.rpartition(".")[2])
def test_settings_read_from_the_source_are_those_that_the_parser_finds(path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(pkgutil.resolve_name(path), "x", fail_untyped=False)
    expected = {key.removeprefix("x.").partition(".")[0] for key, _ in parser.get_defaults().items()}
    assert source_text.settings(path).keys() == expected
    assert all(setting.about for setting in source_text.settings(path).values() if path.startswith("lrsa_lit.data"))


@pytest.mark.parametrize("path", catalogue.named("filters").values(), ids=lambda path: path.rpartition(".")[2])
def test_defaults_read_from_fields_are_those_of_the_class(path):
    items = [item for item in dataclasses.fields(pkgutil.resolve_name(path)) if item.default is not dataclasses.MISSING]
    found = source_text.settings(path)
    assert [ast.literal_eval(found[item.name].default) for item in items] == [item.default for item in items]


@pytest.mark.parametrize("found", [LongContextQA, Backbone, LoRA, RopeScaling, LRSAConfig, lightning.Trainer])
def test_keys_of_parts_are_those_that_the_parser_finds(found):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, "x", fail_untyped=False)
    expected = {key.removeprefix("x.").partition(".")[0] for key, _ in parser.get_defaults().items()}
    (path,) = [path for part in catalogue.parts() if (path := catalogue.part_of(part)).endswith(f".{found.__name__}")]
    assert catalogue.keys(path).keys() == expected


def test_help_lists_what_the_project_has_in_one_line_each_and_the_shipped_files(capfd):
    text = shown(capfd, "fit", "--help")
    lines = text.splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 120
    for path in CLASSES:
        name = path.rpartition(".")[2]
        assert any(line.startswith(f"  {name} ") and len(line.split()) > 2 for line in lines), name
    for word in (
        "--help-all",
        "--data.help QAFiles",
        " smollm2,",
        " tiny",
        "--model.lrsa.top_k",
        "--trainer.max_steps",
    ):
        assert word in text


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_help_of_an_evaluation_has_its_own_settings(command, capfd):
    text = shown(capfd, command, "-h")
    assert "--budget" in text
    assert "--estimate" not in text


@pytest.mark.parametrize(
    ("flag", "name", "said"),
    [
        ("--data.help", "QAFiles", "--data.hub_splits HUB_SPLITS"),
        ("--data.help", "lrsa_lit.data.Needles", "--data.tasks TASKS"),
        ("--model.lrsa.compressor.help", "QueryRuns", "--model.lrsa.compressor.size SIZE"),
        ("--model.lrsa.system.help", "KVzip", "--model.lrsa.system.kept KEPT"),
        ("--model.objective.help", "Distillation", "--model.objective.direction {forward,reverse}"),
        ("--trainer.callbacks.help", "CaptureSelections", "--trainer.callbacks.samples SAMPLES"),
        ("--data.help", "", "NthOfMany"),
        ("--model.lrsa.system.help", "", "StreamingLLM"),
    ],
)
def test_settings_of_a_class_are_shown_by_its_short_name(flag, name, said, capfd):
    assert said in shown(capfd, "fit", flag, *filter(None, [name]))


def test_help_of_a_name_that_there_is_not_lists_those_that_there_are(capfd):
    assert "QAFiles" in refusal(capfd, "fit", "--data.help", "QAFile")


def test_short_names_serve_in_files_and_flags(tmp_path, capfd):
    (tmp_path / "x.yaml").write_text("trainer: {callbacks: [{class_path: CaptureSelections, init_args: {samples: 1}}]}")
    told = ["--config", "x.yaml", "--data", "QAFiles", "--model.lrsa.compressor", "Recency"]
    text = shown(capfd, "fit", *DEBUG, *told, "--print_config")
    assert "class_path: lrsa_lit.data.QAFiles" in text
    assert "class_path: lrsa_lit.analysis.callback.CaptureSelections" in text
    assert "class_path: lrsa_lit.ops.sparse_attention.Recency" in text


MISTAKES = {
    "no model": ([], "model.backbone.source: no model is named; add --config configs/model/smollm2.yaml"),
    "no data": (["--model.backbone.source", "tiny"], "data: no data set is named; add --config configs/data/hotpotqa"),
    "missing setting": (
        ["--model.backbone.source", "tiny", "--data", "Mixture"],
        "data.init_args.data_sets: is required; add --config configs/data/",
    ),
    "section": ([*DEBUG, "--modl.lrsa.top_k", "3"], "modl: no such setting; the nearest are model"),
    "key": ([*DEBUG, "--model.lrsa.topk", "3"], "model.lrsa.topk: no such setting; the nearest are model.lrsa.top_k"),
    "key of Lightning": ([*DEBUG, "--trainer.max_step=3"], "trainer.max_step: no such setting"),
    "key of a data set": ([*DEBUG, "--data.tran", "x"], "data.init_args.tran: no such setting; the nearest are train"),
    "data set": ([*DEBUG, "--data", "QAFile"], "data: QAFile is not a known class; the nearest are QAFiles"),
    "compressor": ([*DEBUG, "--model.lrsa.compressor", "KeyDif"], "model.lrsa.compressor: KeyDif is not a known class"),
    "callback": (
        [*DEBUG, "--trainer.callbacks+", "AnswerWriters"],
        "trainer.callbacks: AnswerWriters is not a known class",
    ),
    "data file": ([*DEBUG, "--data.init_args.val", "no.jsonl"], "data.init_args.val: 'no.jsonl' is not an"),
    "model folder": ([*DEBUG, "--model.backbone.source", "./no"], "model.backbone.source: './no' does not exist"),
    "checkpoint": ([*DEBUG, "--ckpt_path", "no.ckpt"], "ckpt_path: 'no.ckpt' does not exist"),
    "key in a file": (["--config", "x.yaml"], "--config: x.yaml: model.lrsa.lag: no such setting"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_by_what_helps(arguments, said, tmp_path, capfd):
    (tmp_path / "x.yaml").write_text("model: {lrsa: {lag: 3}}")
    assert refusal(capfd, "fit", *arguments).startswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_mistakes_and_help_are_told_without_pytorch(tmp_path):
    (tmp_path / "x.yaml").write_text("model: {lrsa: {lag: 3}}")
    told = [["fit", *arguments] for arguments, _ in MISTAKES.values()]
    told += [["distil-cache", *DEBUG, "--trainer.max_step=3"], ["token-gates", *DEBUG, "--data.tran", "x"]]
    told += [["input-moments", *DEBUG, "--token", "3"]]
    told += [["sweep", "--grid", "model.lrsa.top_k=1,2", *DEBUG, "--data", "QAFile"], ["test", "--help"]]
    code = f"""
import contextlib, os
from lrsa_lit.cli.main import main
for arguments in {told!r}:
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            main(arguments)
    except SystemExit as stop:
        assert stop.code == 2 or arguments[-1] == "--help", (arguments, stop.code)
"""
    assert not modules_after(code) & HEAVY


def test_python_runs_the_package():
    command = [sys.executable, "-m", "lrsa_lit", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("lrsa-lit ")


def test_a_fit_ends_with_the_commands_that_go_on_with_it(capfd):
    given = [*DEBUG, "--trainer.logger", "false", "--validate_first", "false"]
    main(["fit", *given])
    lines = [line.split(": ", 1) for line in capfd.readouterr().out.splitlines()]
    said = {name: rest for name, *rest in lines if name in ("Best checkpoint", "Test it", "Ask it")}
    (checkpoint,) = said["Best checkpoint"]
    assert said["Ask it"] == [f"lrsa ask --model {checkpoint} report.txt"]
    command = shlex.split(said["Test it"][0])
    # Shipped files have the names that the user typed, wherever they are.
    assert command == ["lrsa", "test", *given, "--ckpt_path", checkpoint]
    main(command[1:])
    assert "Test on 2 questions" in capfd.readouterr().out


def test_the_test_of_a_resumed_fit_takes_its_last_checkpoint(capfd):
    show_next("new.ckpt", ["--ckpt_path", "old.ckpt", "-c", "a.yaml", "--ckpt_path=older.ckpt"], tests=True)
    show_next("new.ckpt", [], tests=False)
    assert capfd.readouterr().out.splitlines() == [
        "Test it: lrsa test -c a.yaml --ckpt_path new.ckpt",
        "Ask it: lrsa ask --model new.ckpt report.txt",
        "Ask it: lrsa ask --model new.ckpt report.txt",
    ]


def test_questions_of_a_fit_with_plugins_need_them_too(capfd):
    show_next("new.ckpt", ["-c", "a.yaml"], tests=False, modules=["one", "two"])
    assert capfd.readouterr().out == "Ask it: lrsa ask --plugins one --plugins two --model new.ckpt report.txt\n"
