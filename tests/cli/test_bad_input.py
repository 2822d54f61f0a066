"""A user's mistake ends in one line and exit code 2, with nothing half-written."""

import os

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, recorded_runs, refusal

from lrsa_lit.cli.main import main


def bad_inputs():
    broken = '{"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}\n{"id": \n'
    record = '{"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}\n'
    rule = "model.lrsa"
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 9))
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
    yield (
        "number of a wrong type",
        [f"--{rule}.chunk_size", "true"],
        {},
        ["model.lrsa.chunk_size: True is not allowed; it must be of type int"],
    )
    yield "broken YAML", ["--config", "x.yaml"], {"x.yaml": "model: ["}, ["--config", "x.yaml", "line 1"]
    yield "config that is a folder", ["--config", "."], {}, ["--config: . is no file"]
    yield "config that is a list", ["--config", "x.yaml"], {"x.yaml": "- a"}, ["--config: x.yaml", "list", "mapping"]
    yield "empty config", ["--config", "x.yaml"], {"x.yaml": "# all of it"}, ["--config: x.yaml", "nothing", "mapping"]
    yield (
        "section twice",
        ["--config", "x.yaml"],
        {"x.yaml": "model: {lrsa: {top_k: 4}}\nmodel: {max_new_tokens: 4}"},
        ["--config: x.yaml, line 2", "'model'", "twice"],
    )
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
    yield (
        "empty split",
        ["--data.init_args.train", "x.jsonl"],
        {"x.jsonl": ""},
        ["data.init_args.train: 'x.jsonl'", "train"],
    )
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
    yield "checkpoint by a word", ["--ckpt_path", "best"], {}, ["ckpt_path", "best", "last"]
    yield (
        "twice the same id",
        ["--data.init_args.train", "x.jsonl"],
        {"x.jsonl": record + record},
        ["data.init_args.train: 'x.jsonl'", "'a'", "train"],
    )
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
    yield "no such adapters", ["--model.backbone.lora", "{target_modules: [nope]}"], {}, ["lora.target_modules", "nope"]
    yield (
        "store that is none",
        ["--trainer.logger", "lrsa_lit.tracking.MLflowRun", "--trainer.logger.tracking_uri", "sqlite:///x.db"],
        {"x.db": "no database"},
        ["tracking_uri", "x.db"],
    )
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
    yield "config with a NUL", ["--config", "a\0b"], {}, ["--config: ", "no path"]
    yield "config of a long name", ["--config", "a" * 5000], {}, ["--config: ", "no path"]
    yield "config that contains itself", ["--config", "x.yaml"], {"x.yaml": "a: &a [*a]"}, ["x.yaml", "contains itself"]
    yield "value that contains itself", ["--model.evaluate", "{x: &a [*a]}"], {}, ["model.evaluate", "contains itself"]
    yield "value without an end", ["--model.lrsa=" + "{a: " * 2000], {}, ["model.lrsa", "nested too deeply"]
    yield "group of a file that explodes", ["--model.lrsa", "x.yaml"], {"x.yaml": laughs}, ["model.lrsa", "values"]
    yield "NUL in a group", ["--model.backbone=a\0b"], {}, ["model.backbone", "NUL"]
    yield (
        "unknown kind of folder",
        ["--trainer.default_root_dir", "package:///x"],
        {},
        ["trainer.default_root_dir: 'pack"],
    )
    yield "unreadable data", ["--data.init_args.train", "/proc/self/mem"], {}, ["data.init_args.train: '/proc/self"]
    yield "seed", ["--seed_everything", "-1"], {}, ["seed_everything", "-1", "from 0 to"]
    yield "lora rank", ["--model.backbone.lora.rank", "0"], {}, ["model.backbone.lora.rank", "0", ">= 1"]


@pytest.mark.parametrize(("options", "files", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_inputs()])
def test_bad_input_is_one_line(options, files, named, tmp_path, capfd):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    error = refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", *options)
    for part in named:
        assert part in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not [path for path in tmp_path.rglob("*.arrow") if "broken" in str(path)]


@pytest.mark.parametrize(("command", "split"), [("test", "test"), ("validate", "val"), ("predict", "predict")])
def test_an_evaluation_of_no_batch(command, split, capfd):
    error = refusal(capfd, command, *DEBUG, *NO_LOGGER, f"--trainer.limit_{split}_batches", "0")
    assert f"trainer.limit_{split}_batches: 0" in error


@pytest.mark.parametrize("group", ["model", "model.backbone", "model.lrsa", "trainer"])
def test_a_group_of_a_file_that_is_no_text(group, tmp_path, capfd):
    (tmp_path / "junk.json").write_bytes(b"\x9b\xff" * 9)
    assert refusal(capfd, "fit", *DEBUG, f"--{group}=junk.json").startswith(f"{group}=junk.json: ")


@pytest.mark.parametrize("setting", ["model.backbone", "data", "data.init_args.train", "ckpt_path"])
def test_a_pipe_is_not_waited_for(setting, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(capfd, "fit", *DEBUG, f"--{setting}", "pipe").startswith(f"{setting}: pipe ")


def test_home_is_where_runs_are_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    main(["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.default_root_dir", "~/runs"])
    (saved,) = (tmp_path / "home/runs").rglob("last.ckpt")
    assert not (tmp_path / "~").exists()
    (tmp_path / "home/x.ckpt").write_bytes(saved.read_bytes())
    main(["export", "~/x.ckpt", "--out", "~/model"])
    assert (tmp_path / "home/model/config.json").is_file()


def test_settings_in_the_environment_are_named(monkeypatch, caplog, capfd):
    """LightningCLI and the Trainer would read them, or drop them without a word."""
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "3")
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "3")
    with pytest.raises(SystemExit):
        main(["fit", *DEBUG, *NO_LOGGER, "--trainer.max_steps", "0"])
    assert "PL_FIT__TRAINER__MAX_STEPS, PL_TRAINER_MAX_STEPS" in caplog.text


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
        assert "ckpt_path: " in refusal(capfd, command, *DEBUG, *NO_LOGGER, *options, "--ckpt_path", full)


def test_unsupported_family_is_one_line(tmp_path, capfd):
    from transformers import BloomConfig, BloomForCausalLM

    from lrsa_lit.models.tiny import tiny_tokenizer

    BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "bloom"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    assert "BloomForCausalLM" in refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--model.backbone.source", "./bloom")


def test_predictions_of_a_sharded_model(capfd):
    assert "trainer.strategy" in refusal(capfd, "predict", *DEBUG, *NO_LOGGER, "--config", "configs/trainer/fsdp.yaml")


def test_predictions_into_an_unwritable_folder(capfd):
    writer = "[{class_path: lrsa_lit.callbacks.PredictionWriter, init_args: {path: /proc/x/p.jsonl}}]"
    error = refusal(capfd, "predict", *DEBUG, *NO_LOGGER, "--trainer.callbacks", writer)
    assert "'/proc/x/p.jsonl' cannot be written" in error


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


@pytest.mark.parametrize("content", [{"weights": 1}, [1]], ids=["dict", "list"])
def test_a_file_of_torch_that_is_no_checkpoint(content, tmp_path, capfd):
    torch.save(content, tmp_path / "x.ckpt")
    assert "ckpt_path: x.ckpt is no checkpoint" in refusal(capfd, "test", *DEBUG, *NO_LOGGER, "--ckpt_path", "x.ckpt")


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
