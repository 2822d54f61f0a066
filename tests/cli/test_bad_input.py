"""Settings that a fit cannot have end it in one line with exit code 2, before anything is written."""

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, recorded_runs, refusal, refused_before_anything_is_written

from lrsa_lit.cli.main import main


def bad_settings():
    rule = "model.lrsa"
    yield "lag size negative", [f"--{rule}.lag_size", "-3"], {}, ["lrsa.lag_size", "-3", ">= 2"]
    yield "lag size one", [f"--{rule}.lag_size", "1"], {}, ["lrsa.lag_size", "1", ">= 2"]
    yield "lag size text", [f"--{rule}.lag_size", "abc"], {}, ["model.lrsa.lag_size", "abc", "int"]
    yield "top k negative", [f"--{rule}.top_k", "-1"], {}, ["lrsa.top_k", "-1", "0 to lag_size (32)"]
    yield "top k above lag size", [f"--{rule}.top_k", "33"], {}, ["lrsa.top_k", "33", "0 to lag_size (32)"]
    wrong = "model.lrsa.head_top_k: has K of 3 layers x 2 heads; the model has 2 layers x 2 heads"
    yield "budgets of another shape", [f"--{rule}.head_top_k", "[[1,2],[1,2],3]"], {}, [wrong]
    bound = "model.lrsa.head_top_k.1.0: 33 is not allowed; it must be an integer from 0 to lag_size (32)"
    yield "budget above lag size", [f"--{rule}.head_top_k", "x.json"], {"x.json": "[[1, 2], [33, 0]]"}, [bound]
    bound = "model.lrsa.head_top_k.1: 'abc' is not allowed; it must be an integer from 0 to lag_size (32)"
    yield "budget that is no number", [f"--{rule}.head_top_k", "[8,abc]"], {}, [bound]
    yield (
        "budget that is no number in YAML",
        ["--config", "x.yaml"],
        {"x.yaml": "model: {lrsa: {head_top_k: [8, abc]}}"},
        [bound],
    )
    system = "{class_path: StreamingLLM, init_args: {no: 1}}"
    key = "the key 'no' is read as true or false; write it in quotes"
    yield "key that is no name", [f"--{rule}.system", system], {}, [f"model.lrsa.system: {key}"]
    yield (
        "key that is no name in YAML",
        ["--config", "x.yaml"],
        {"x.yaml": f"\nno: {system}"},
        [f"x.yaml, line 2: {key}"],
    )
    yield "chunk zero", [f"--{rule}.chunk_size", "0"], {}, ["lrsa.chunk_size", "0", ">= 1"]
    yield "unknown key", [f"--{rule}.topk", "3"], {}, ["model.lrsa.topk", "model.lrsa.top_k"]
    yield (
        "unknown key in YAML",
        ["--config", "x.yaml"],
        {"x.yaml": "model: {lrsa: {lag: 3}}"},
        ["model.lrsa.lag", "lag_size"],
    )
    yield (
        "unknown argument of a class",
        ["--data.init_args.max_token", "100"],
        {},
        ["data.init_args.max_token: no such setting", "max_tokens"],
    )
    yield (
        "unknown argument of a compressor",
        ["--config", "x.yaml"],
        {"x.yaml": "model: {lrsa: {compressor: {class_path: ChunkWise, init_args: {siz: 4}}}}"},
        ["--config: x.yaml: model.lrsa.compressor.init_args.siz: no such setting", "size"],
    )
    yield (
        "window of queries longer than a partition",
        ["--model.lrsa.compressor", "QueryRuns", "--model.lrsa.lag_size", "8", "--model.lrsa.top_k", "2"],
        {},
        ["model.lrsa.compressor.init_args.window: 16", "8"],
    )
    window = "{q: {compressor: {class_path: QueryAttention, init_args: {window: 99}}}}"
    wrong = (
        "model.evaluate.q.compressor.init_args.window: 99 is not allowed; it must be an integer from 0 to lag_size (32)"
    )
    yield "the same in an evaluation", ["--model.evaluate", window], {}, [wrong]
    weightless = "0.5 is not read by the compressor MeanPool; leave one of them out"
    yield (
        "weight that the compressor does not have",
        [f"--{rule}.value_weight", "0.5", f"--{rule}.compressor", "MeanPool"],
        {},
        [f"model.lrsa.value_weight: {weightless}"],
    )
    yield (
        "the same weight in an evaluation",
        ["--model.evaluate", "{x: {value_weight: 0.5, compressor: MeanPool}}"],
        {},
        [f"model.evaluate.x.value_weight: {weightless}"],
    )
    yield (
        "number of a wrong type",
        [f"--{rule}.chunk_size", "true"],
        {},
        ["model.lrsa.chunk_size: True is not allowed; it must be of type int"],
    )
    yield (
        "unknown evaluation setting",
        ["--model.evaluate", "{k: {topk: 1}}"],
        {},
        ["model.evaluate.k", "topk", "top_k"],
    )
    yield "dense layer too high", [f"--{rule}.dense_layers", "[7]"], {}, ["lrsa.dense_layers", "7", "0 to 1"]
    yield "question above the budget", ["--data.init_args.max_tokens", "20"], {}, ["data.init_args.max_tokens", "20"]
    yield "beginning of a setting", ["--trainer.max_step", "2"], {}, ["trainer.max_step: no such", "trainer.max_steps"]
    yield "optimizer of a wrong value", ["--model.optimizer.init_args.lr", "-1"], {}, ["model.optimizer", "-1"]
    yield "no steps to plan", ["--trainer.max_steps", "0"], {}, ["model.lr_scheduler", "0"]
    yield (
        "more tokens than positions",
        ["--data.init_args.max_tokens", "9000"],
        {},
        ["max_tokens", "9000", "8192", "rope_scaling"],
    )
    yield (
        "more tokens than scaled positions",
        ["--data.init_args.max_tokens", "18000", "--model.backbone.rope_scaling", "{rope_type: linear, factor: 2}"],
        {},
        ["max_tokens", "18000", "16384"],
    )
    yield (
        "rope type",
        ["--model.backbone.rope_scaling", "{rope_type: ntk, factor: 2}"],
        {},
        ["model.backbone.rope_scaling", "ntk", "yarn"],
    )
    yield (
        "rope factor",
        ["--model.backbone.rope_scaling", "{rope_type: yarn, factor: 0}"],
        {},
        ["model.backbone.rope_scaling.factor", "0"],
    )
    yield "rounded positions", ["--trainer.precision", "bf16-true"], {}, ["trainer.precision", "model.backbone.dtype"]
    yield "evaluation name", ["--model.evaluate", "{a/b: null}"], {}, ["model.evaluate", "a/b"]
    yield "rule of null", ["--config", "x.yaml"], {"x.yaml": "model: {lrsa: null}"}, ["model.lrsa: 'null'"]
    yield "budget of null", ["--config", "x.yaml"], {"x.yaml": "data: {init_args: {max_tokens: null}}"}, ["max_tokens"]
    yield "endless schedule", ["--trainer.max_steps", "-1"], {}, ["model.lr_scheduler", "max_steps=-1", "total_steps"]
    yield "warm-up of one step", ["--trainer.max_steps", "10"], {}, ["model.lr_scheduler", "max_steps=10"]
    for plateau in ("lightning.pytorch.cli", "torch.optim.lr_scheduler"):
        yield (
            f"a metric's schedule of {plateau.partition('.')[0]}",
            ["--config", "x.yaml"],
            {
                "x.yaml": f"model: {{lr_scheduler: {{class_path: {plateau}.ReduceLROnPlateau, init_args: "
                f"{'{monitor: val/f1}' if 'cli' in plateau else '{patience: 3}'}}}}}"
            },
            ["model.lr_scheduler", "ReduceLROnPlateau"],
        )
    for finder in ("LearningRateFinder", "BatchSizeFinder"):
        yield finder, ["--trainer.callbacks+", finder], {}, ["trainer.callbacks", finder, "lrsa "]
    scheduler = ["--trainer.callbacks+", "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{2: 4}"]
    said = ["trainer.callbacks: 'GradientAccumulationScheduler'", "accumulate_grad_batches"]
    yield "steps of other sizes", scheduler, {}, said
    yield "no device", ["--trainer.devices", "0"], {}, ["trainer: ", "devices", "0"]
    yield "duration", ["--trainer.max_time", "soon"], {}, ["trainer: ", "soon", "DD:HH:MM:SS"]
    for name in ("val_check_interval", "accumulate_grad_batches", "log_every_n_steps"):
        yield f"{name} of zero", [f"--trainer.{name}", "0"], {}, [f"trainer.{name}: 0", "more than 0"]
    yield "no training batch", ["--trainer.limit_train_batches", "0"], {}, ["trainer.limit_train_batches: 0", "fit"]
    yield (
        "more processes than cores",
        ["--trainer.accelerator", "cpu", "--trainer.devices", "9999"],
        {},
        ["trainer.devices: 9999", "cores"],
    )
    for accelerator in ("tpu", "xyz"):
        yield f"accelerator {accelerator}", ["--trainer.accelerator", accelerator], {}, ["trainer: "]
    yield "value that contains itself", ["--model.evaluate", "{x: &a [*a]}"], {}, ["model.evaluate", "contains itself"]
    yield "value without an end", ["--model.lrsa=" + "{a: " * 2000], {}, ["model.lrsa", "nested too deeply"]
    yield "NUL in a group", ["--model.backbone=a\0b"], {}, ["model.backbone", "NUL"]
    yield "seed", ["--seed_everything", "-1"], {}, ["seed_everything", "-1", "from 0 to"]
    yield "lora rank", ["--model.backbone.lora.rank", "0"], {}, ["model.backbone.lora.rank", "0", ">= 1"]


@pytest.mark.parametrize(
    ("options", "files", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_settings()]
)
def test_bad_settings_are_one_line(options, files, named, tmp_path, capfd):
    refused_before_anything_is_written(capfd, tmp_path, options, files, named)


def test_adapters_of_no_module(capfd):
    """The model tells, when it is built."""
    error = refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--model.backbone.lora", "{target_modules: [nope]}")
    assert "lora.target_modules" in error
    assert "nope" in error


@pytest.mark.parametrize(("command", "split"), [("test", "test"), ("validate", "val"), ("predict", "predict")])
def test_an_evaluation_of_no_batch(command, split, capfd):
    error = refusal(capfd, command, *DEBUG, *NO_LOGGER, f"--trainer.limit_{split}_batches", "0")
    assert f"trainer.limit_{split}_batches: 0" in error


def test_settings_in_the_environment_are_named(monkeypatch, caplog, capfd):
    """LightningCLI and the Trainer would read them, or drop them without a word."""
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "3")
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "3")
    with pytest.raises(SystemExit):
        main(["fit", *DEBUG, *NO_LOGGER, "--trainer.max_steps", "0"])
    assert "PL_FIT__TRAINER__MAX_STEPS, PL_TRAINER_MAX_STEPS" in caplog.text


def test_predictions_of_a_sharded_model(capfd):
    assert "trainer.strategy" in refusal(capfd, "predict", *DEBUG, *NO_LOGGER, "--config", "configs/trainer/fsdp.yaml")


def test_predictions_that_nobody_would_write(tmp_path, capfd):
    assert "PredictionWriter" in refusal(capfd, "predict", *DEBUG, *NO_LOGGER, "--trainer.callbacks", "[]")


EARLY_STOPPING, CHECKPOINT = "lightning.pytorch.callbacks.EarlyStopping", "lrsa_lit.checkpoints.SafeModelCheckpoint"


@pytest.mark.parametrize(
    ("callback", "monitor", "first"),
    [
        (EARLY_STOPPING, "val/nope", "true"),
        (CHECKPOINT, "val/nope", "true"),
        (EARLY_STOPPING, "val/nope", "false"),
        (EARLY_STOPPING, "nope", "false"),
        (CHECKPOINT, "val/nope", "false"),
    ],
)
def test_a_metric_that_there_is_not_is_named_at_the_first_validation(callback, monitor, first, tmp_path, capfd):
    watching = ["--trainer.callbacks+", callback, "--trainer.callbacks.monitor", monitor]
    error = refusal(capfd, "fit", *DEBUG, "--validate_first", first, *watching)
    assert error.startswith(f"trainer.callbacks: {callback.rpartition('.')[2]} ")
    assert repr(monitor) in error
    assert "val/f1, " in error
    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    assert run.info.status == "FAILED"
    # What was trained until then is not lost, but for that validation.
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ([] if first == "true" else ["last.ckpt"])


def test_early_stopping_that_is_told_to_bear_a_missing_metric_does(capfd):
    watching = ["--trainer.callbacks+", EARLY_STOPPING, "--trainer.callbacks.monitor", "val/nope"]
    main(["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", *watching, "--trainer.callbacks.strict", "false"])
    assert "step 4" in capfd.readouterr().out


def test_unknown_command(capfd):
    assert "'train'" in refusal(capfd, "train")


@pytest.mark.parametrize(
    ("command", "remedy"),
    [("fit", "data.init_args.batch_size"), ("test", "eval_batch_size"), ("ask", "shorten the text")],
)
def test_a_device_without_enough_memory(command, remedy, capfd, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of …\nMore lines."
        )

    monkeypatch.setattr("lrsa_lit.cli.ask.run" if command == "ask" else "lrsa_lit.cli.lightning_cli.run", full)
    with pytest.raises(SystemExit) as stop:
        main([command] if command == "ask" else [command, *DEBUG])
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lrsa: error: the device is out of memory (it was asked for 2.50 GiB more); ")
    assert remedy in line


def test_other_failures_are_not_hidden(monkeypatch):
    def broken(*_):
        raise RuntimeError("a mistake of the code")

    monkeypatch.setattr("lrsa_lit.cli.ask.run", broken)
    with pytest.raises(RuntimeError, match="a mistake of the code"):
        main(["ask"])
