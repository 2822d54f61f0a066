"""The command line, driven in process with the shipped YAMLs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrsa_lit
from lrsa_lit.cli import COMMANDS, HELP, main

CONFIGS = Path(__file__).parents[1] / "configs"
DEBUG = ["--config", "configs/debug/tiny.yaml"]
NO_LOGGER = ["--trainer.logger", "false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, as a user far from the checkout would, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["lrsa"])
    return tmp_path


def run_metrics(store: Path, experiment: str) -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


def test_fit_then_test_then_predict_then_validate(tmp_path, capfd):
    main(["fit", *DEBUG])
    shown = capfd.readouterr().out
    assert "Validation on 8 questions, step 0 → step 4" in shown
    assert re.search(r"LRSA .* → ", shown)
    assert re.search(r"dense .* → ", shown)
    assert f"sqlite:///{tmp_path}/runs/mlflow.db" in shown

    (run,) = run_metrics(tmp_path / "runs/mlflow.db", "debug")
    assert run.data.params["model.lrsa.top_k"] == "8"
    assert run.data.params["model.lrsa.lag_size"] == "32"
    assert run.data.tags["seed"] == "0"
    assert run.data.tags["version.torch"] == torch.__version__
    assert run.info.run_name == "tiny-L32-K8-s0"
    expected = {f"val/{name}" for name in ("loss", "f1", "em", "recall", "dense/loss", "dense/f1")}
    assert expected | {"train/loss", "train/lr"} <= set(run.data.metrics)
    assert run.data.metrics["val/loss"] != run.data.metrics["val/dense/loss"]

    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    main(["test", *DEBUG, "--ckpt_path", str(checkpoint), *NO_LOGGER])
    assert "test/f1" in capfd.readouterr().out

    main(["predict", *DEBUG, "--ckpt_path", str(checkpoint), *NO_LOGGER])
    lines = [json.loads(line) for line in (tmp_path / "runs/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    fields = {"id", "prediction", "gold", "f1", "exact_match", "prompt_tokens", "new_tokens", "config"}
    assert set(lines[0]) == fields
    assert not list((tmp_path / "runs").glob("*.partial"))

    main(["validate", *DEBUG, "--ckpt_path", str(checkpoint), *NO_LOGGER])
    assert "val/f1" in capfd.readouterr().out


def test_recorded_config_repeats_the_run(tmp_path):
    main(["fit", *DEBUG, "--seed_everything", "3", "--model.lrsa.top_k", "5"])
    (first,) = run_metrics(tmp_path / "runs/mlflow.db", "debug")
    recorded = next((tmp_path / "runs/artifacts").rglob("config.yaml"))

    main(["fit", "--config", str(recorded)])
    second, _ = run_metrics(tmp_path / "runs/mlflow.db", "debug")

    assert second.data.params == first.data.params
    assert second.data.metrics["train/loss"] == first.data.metrics["train/loss"]
    assert second.data.metrics["val/loss"] == first.data.metrics["val/loss"]


def test_checkpoint_keeps_what_the_user_asks_for(tmp_path, capfd):
    main(["fit", *DEBUG, *NO_LOGGER])
    checkpoint = str(next((tmp_path / "runs").rglob("last.ckpt")))
    capfd.readouterr()
    losses = []
    for top_k in ("8", "2"):
        main(["test", *DEBUG, *NO_LOGGER, "--ckpt_path", checkpoint, "--model.lrsa.top_k", top_k])
        losses.append(re.search(r"test/loss\D*([\d.]+)", capfd.readouterr().out)[1])
    assert losses[0] != losses[1]


def test_lora_with_gradient_checkpointing_saves_adapters_only(tmp_path):
    main(
        [
            "fit",
            *DEBUG,
            *NO_LOGGER,
            "--model.backbone.lora",
            "{rank: 4}",
            "--model.backbone.gradient_checkpointing",
            "true",
        ]
    )
    saved = torch.load(next((tmp_path / "runs").rglob("last.ckpt")), weights_only=True)
    assert saved["state_dict"]
    assert all("lora_" in name for name in saved["state_dict"])
    main(
        [
            "test",
            *DEBUG,
            *NO_LOGGER,
            "--model.backbone.lora",
            "{rank: 4}",
            "--ckpt_path",
            str(next((tmp_path / "runs").rglob("last.ckpt"))),
        ]
    )


@pytest.mark.parametrize("compressor", ["LagRelative", "RandomTokens", "Recency", "Strided", "MeanPool"])
def test_each_compressor_is_a_yaml_line(compressor):
    main(
        [
            "fit",
            *DEBUG,
            *NO_LOGGER,
            "--model.lrsa.compressor",
            compressor,
            "--trainer.max_steps",
            "1",
            "--trainer.val_check_interval",
            "1",
        ]
    )


def test_dense_training_and_several_budgets_in_one_evaluation(tmp_path):
    main(["fit", *DEBUG, "--model.train_attention", "null", "--model.evaluate", "{dense: null, k4: {top_k: 4}}"])
    (run,) = run_metrics(tmp_path / "runs/mlflow.db", "debug")
    metrics = run.data.metrics
    assert len({metrics["val/loss"], metrics["val/dense/loss"], metrics["val/k4/loss"]}) == 3
    assert run.info.run_name == "tiny-dense-L32-K8-s0"


def test_fit_without_mlflow_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    main(["fit", *DEBUG, *NO_LOGGER])


def test_print_config_resolves_interpolation(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, "--model.optimizer.init_args.lr", "0.5", "--trainer.max_steps", "7", "--print_config"])
    assert stop.value.code == 0
    shown = capfd.readouterr().out
    assert "max_lr: 0.5" in shown
    assert "total_steps: 7" in shown


def bad_inputs():
    broken = '{"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}\n{"id": \n'
    record = '{"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}\n'
    rule = "model.lrsa"
    yield "lag size negative", [f"--{rule}.lag_size", "-3"], {}, ["lrsa.lag_size", "-3", ">= 2"]
    yield "lag size one", [f"--{rule}.lag_size", "1"], {}, ["lrsa.lag_size", "1", ">= 2"]
    yield "lag size text", [f"--{rule}.lag_size", "abc"], {}, ["model.lrsa.lag_size", "abc", "int"]
    yield "top k negative", [f"--{rule}.top_k", "-1"], {}, ["lrsa.top_k", "-1", "0 to lag_size (32)"]
    yield "top k above lag size", [f"--{rule}.top_k", "33"], {}, ["lrsa.top_k", "33", "0 to lag_size (32)"]
    yield "chunk zero", [f"--{rule}.chunk_size", "0"], {}, ["lrsa.chunk_size", "0", ">= 1"]
    yield "unknown key", [f"--{rule}.topk", "3"], {}, ["model.lrsa.topk", "model.lrsa.top_k"]
    yield (
        "unknown key in YAML",
        ["--config", "x.yaml"],
        {"x.yaml": "model: {lrsa: {lag: 3}}"},
        ["model.lrsa.lag", "lag_size"],
    )
    yield "broken YAML", ["--config", "x.yaml"], {"x.yaml": "model: ["}, ["--config", "x.yaml", "line 1"]
    yield "missing config", ["--config", "nowhere.yaml"], {}, ["--config", "nowhere.yaml"]
    yield (
        "unknown evaluation setting",
        ["--model.evaluate", "{k: {topk: 1}}"],
        {},
        ["model.evaluate.k", "topk", "top_k"],
    )
    yield "dense layer too high", [f"--{rule}.dense_layers", "[7]"], {}, ["lrsa.dense_layers", "7", "0 to 1"]
    yield (
        "missing model package",
        ["--model.backbone.source", "package://no-such-dist/x.gguf"],
        {},
        ["no-such-dist", "pip install"],
    )
    yield "missing model folder", ["--model.backbone.source", "./nowhere"], {}, ["model.backbone.source", "./nowhere"]
    yield (
        "corrupt model",
        ["--model.backbone.source", "x.gguf", "--model.backbone.sha256", "00"],
        {"x.gguf": "no"},
        ["x.gguf", "sha256"],
    )
    yield (
        "unreadable model",
        ["--model.backbone.source", "x.gguf"],
        {"x.gguf": "no"},
        ["model.backbone.source", "x.gguf"],
    )
    yield (
        "corrupt data package",
        ["--data.class_path", "lrsa_lit.data.HotpotQA", "--data.init_args.sha256", "00"],
        {},
        ["hotpotqa.json", "sha256"],
    )
    yield "broken JSON line", ["--data.init_args.train", "x.jsonl"], {"x.jsonl": broken}, ["x.jsonl", "line 2"]
    yield "missing data file", ["--data.init_args.val", "nowhere.jsonl"], {}, ["nowhere.jsonl"]
    yield "empty split", ["--data.init_args.train", "x.jsonl"], {"x.jsonl": ""}, ["train"]
    yield "question above the budget", ["--data.init_args.max_tokens", "20"], {}, ["data.init_args.max_tokens", "20"]
    yield (
        "unwritable output",
        ["--trainer.default_root_dir", "/proc/nowhere"],
        {},
        ["trainer.default_root_dir", "/proc/nowhere"],
    )
    yield (
        "unwritable store",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "sqlite:////proc/x/y.db"],
        {},
        ["tracking_uri", "/proc/x/y.db"],
    )
    yield (
        "file store",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "file:./x"],
        {},
        ["tracking_uri", "file:./x", "sqlite:///"],
    )
    yield "missing checkpoint", ["--ckpt_path", "nowhere.ckpt"], {}, ["ckpt_path", "nowhere.ckpt"]
    yield "junk checkpoint", ["--ckpt_path", "x.pt"], {"x.pt": "no"}, ["ckpt_path", "x.pt"]
    yield "checkpoint by a word", ["--ckpt_path", "last"], {}, ["ckpt_path", "last"]
    yield "twice the same id", ["--data.init_args.train", "x.jsonl"], {"x.jsonl": record + record}, ["'a'", "train"]
    yield "more tokens than positions", ["--data.init_args.max_tokens", "9000"], {}, ["max_tokens", "9000", "8192"]
    yield "rounded positions", ["--trainer.precision", "bf16-true"], {}, ["trainer.precision", "model.backbone.dtype"]
    yield "evaluation name", ["--model.evaluate", "{a/b: null}"], {}, ["model.evaluate", "a/b"]
    yield "rule of null", ["--config", "x.yaml"], {"x.yaml": "model: {lrsa: null}"}, ["lrsa"]
    yield "budget of null", ["--config", "x.yaml"], {"x.yaml": "data: {init_args: {max_tokens: null}}"}, ["max_tokens"]
    yield "no such adapters", ["--model.backbone.lora", "{target_modules: [nope]}"], {}, ["lora.target_modules", "nope"]
    yield (
        "store that is none",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "sqlite:///x.db"],
        {"x.db": "no database"},
        ["tracking_uri", "x.db"],
    )
    yield "endless schedule", ["--trainer.max_steps", "-1"], {}, ["model.lr_scheduler", "-1"]
    yield "lora rank", ["--model.backbone.lora.rank", "0"], {}, ["model.backbone.lora.rank", "0", ">= 1"]


@pytest.mark.parametrize(("options", "files", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_inputs()])
def test_bad_input_is_one_line(options, files, named, tmp_path, capfd):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", *options])
    assert stop.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lrsa: error:")]
    assert len(errors) == 1
    for part in named:
        assert part in errors[0]
    assert "Traceback" not in errors[0]
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not [path for path in tmp_path.rglob("*.arrow") if "broken" in str(path)]


def test_bad_input_leaves_no_run_behind(tmp_path, capfd):
    for options in (
        ["--model.lrsa.lag_size", "-3"],
        ["--data.init_args.max_tokens", "20"],
        ["--model.lrsa.dense_layers", "[7]"],
    ):
        with pytest.raises(SystemExit):
            main(["fit", *DEBUG, *options])
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert not client.search_runs([found.experiment_id for found in client.search_experiments()])


def test_checkpoint_of_another_kind_of_training(tmp_path, capfd):
    main(["fit", *DEBUG, *NO_LOGGER])
    full = str(next((tmp_path / "runs").rglob("last.ckpt")))
    for options in (["--model.backbone.lora", "{rank: 4}"], ["--trainer.max_steps", "8"]):
        command = "test" if "lora" in options[0] else "fit"
        with pytest.raises(SystemExit) as stop:
            main([command, *DEBUG, *NO_LOGGER, *options, "--ckpt_path", full])
        assert stop.value.code == 2
        assert "lrsa: error: ckpt_path: " in capfd.readouterr().err


def test_after_is_measured_after_the_last_step(capfd):
    main(["fit", *DEBUG, *NO_LOGGER, "--trainer.max_steps", "3"])
    assert "step 0 → step 3" in capfd.readouterr().out


def test_seed_changes_the_order_but_not_the_examples(tmp_path):
    losses = []
    for seed in ("0", "3"):
        main(["fit", *DEBUG, "--seed_everything", seed, "--trainer.max_steps", "2", "--validate_first", "false"])
    for run in run_metrics(tmp_path / "runs/mlflow.db", "debug"):
        losses.append(run.data.metrics["train/loss"])
        assert run.info.status == "FINISHED"
    assert len({run.data.tags["data"] for run in run_metrics(tmp_path / "runs/mlflow.db", "debug")}) == 1
    assert losses[0] != losses[1]


def test_interrupt_loses_nothing_and_says_how_to_go_on(tmp_path, capfd, monkeypatch):
    from lrsa_lit.tasks import LongContextQA

    training_step = LongContextQA.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return training_step(self, batch, batch_idx)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LongContextQA, "training_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, *NO_LOGGER])
    # Lightning ignores further Ctrl-C from here on.
    signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(LongContextQA, "training_step", training_step)
    assert stop.value.code == 130
    said = re.search(r"interrupted at step 2; go on with --ckpt_path (\S+)", capfd.readouterr().err)
    main(["fit", *DEBUG, *NO_LOGGER, "--ckpt_path", said[1]])
    assert "step 4" in capfd.readouterr().out


def test_mixed_precision_runs(capfd):
    main(["fit", *DEBUG, *NO_LOGGER, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "2"])
    assert "step 0 → step 2" in capfd.readouterr().out


def test_training_without_validation_data(capfd):
    main(["fit", *DEBUG, *NO_LOGGER, "--data.init_args.val", "null", "--trainer.max_steps", "2"])
    assert "lrsa: error" not in capfd.readouterr().err


def test_unsupported_family_is_one_line(tmp_path, capfd):
    from transformers import BloomConfig, BloomForCausalLM

    from lrsa_lit.models.tiny import tiny_tokenizer

    BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, *NO_LOGGER, "--model.backbone.source", "./bloom"])
    assert stop.value.code == 2
    assert "BloomForCausalLM" in capfd.readouterr().err.splitlines()[-1]


def test_predictions_into_an_unwritable_folder(capfd):
    writer = "[{class_path: lrsa_lit.callbacks.PredictionWriter, init_args: {path: /proc/x/p.jsonl}}]"
    with pytest.raises(SystemExit):
        main(["predict", *DEBUG, *NO_LOGGER, "--trainer.callbacks", writer])
    assert "/proc/x/p.jsonl cannot be written" in capfd.readouterr().err


def test_unknown_command(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert "'train'" in capfd.readouterr().err


def test_help_and_version_import_nothing_heavy():
    code = "import sys; from lrsa_lit.cli import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    for argument in ("--help", "--version"):
        shown = subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
        ).stdout
        assert "'torch'" not in shown
        assert "'lightning'" not in shown
    assert lrsa_lit.__version__ in shown


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


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_each_shipped_config_parses_as_its_first_line_says(path, capfd):
    command = path.read_text().splitlines()[0].removeprefix("# lrsa ").split()
    assert str(path.relative_to(CONFIGS.parent)) in command
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *command,
                "--model.backbone.source",
                "tiny",
                "--data.class_path",
                "lrsa_lit.data.HotpotQA",
                "--print_config",
            ]
        )
    assert stop.value.code == 0
    assert "lag_size" in capfd.readouterr().out
