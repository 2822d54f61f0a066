"""Lightning's own loggers, in place of MLflow's or beside it, without a network."""

import csv
import importlib.util
import json

import pytest
import yaml
from cli_helpers import DEBUG, recorded_runs, refusal

from lrsa_lit.cli.main import main

SHORT = [*DEBUG, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "2", "--trainer.callbacks"]
CALLBACKS = [
    "lrsa_lit.callbacks.FitSummary",
    "lrsa_lit.tracking.SamplePredictions",
    "lrsa_lit.analysis.run_pictures.RunPictures",
    {"class_path": "lrsa_lit.analysis.callback.CaptureSelections", "init_args": {"samples": 1}},
]
NAMED = [each if isinstance(each, dict) else {"class_path": each} for each in CALLBACKS]


def fit(name, *arguments):
    main(["fit", *SHORT, json.dumps(NAMED), "--config", f"configs/logger/{name}.yaml", *arguments])


def holds_files_of_a_run(folder):
    assert (folder / "pictures/scores.png").read_bytes()[:4] == b"\x89PNG"
    assert "<td>" in (folder / "predictions.html").read_text()
    assert json.loads((folder / "predictions/val.jsonl").read_text().splitlines()[0])["LRSA"]
    assert list(folder.glob("selections/*-positions.png"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["lrsa"]["top_k"] == 8


def test_csv_in_place_of_mlflow(elsewhere, capsys):
    fit("csv")
    folder = elsewhere / "runs/lightning_logs/version_0"
    holds_files_of_a_run(folder)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert {"train/loss", "val/f1", "val/dense/loss", "selection/chance"} <= set(rows[0])
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["model.lrsa.lag_size"] == "32"
    assert "CSVLogger: runs/lightning_logs/version_0" in capsys.readouterr().out
    assert not (elsewhere / "runs/mlflow.db").exists()


@pytest.mark.slow
def test_tensorboard_in_place_of_mlflow(elsewhere):
    pytest.importorskip("tensorboard", reason="the optional extra `loggers` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit("tensorboard")
    folder = elsewhere / "runs/lightning_logs/version_0"
    holds_files_of_a_run(folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/f1", "val/dense/f1"} <= set(tags["scalars"])
    assert {"pictures/scores", "selections/survival"} <= set(tags["images"])
    table = events.Tensors("predictions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table.startswith("| step | id | question | gold | LRSA | LRSA F1 | dense | dense F1 |")


@pytest.mark.slow
def test_wandb_offline_beside_mlflow(elsewhere, monkeypatch):
    pytest.importorskip("wandb", reason="the optional extra `loggers` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit("wandb")
    (media,) = (elsewhere / "runs/wandb").glob("offline-run-*/files/media")
    assert list(media.glob("images/pictures/scores_*.png"))
    assert list(media.glob("images/selections/positions_*.png"))
    tables = [json.loads(path.read_text()) for path in media.glob("table/predictions_*.json")]
    assert {tuple(table["columns"][:2]) for table in tables} == {("step", "id")}
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    assert run.info.status == "FINISHED"
    assert "val/f1" in run.data.metrics
    assert list((elsewhere / "runs/artifacts" / run.info.run_id).rglob("scores.png"))


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_logger_whose_package_is_missing_is_one_line(name, package, elsewhere, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda module, *rest: None if module.startswith(package) else find(module, *rest)
    )
    line = refusal(capfd, "fit", *DEBUG, "--config", f"configs/logger/{name}.yaml")
    assert line.startswith("trainer.logger: ")
    assert f"needs {package}, which is not installed" in line
    assert "pip install 'lrsa-lit[loggers]'" in line
    assert not list(elsewhere.rglob("mlflow.db"))


def test_a_picture_that_cannot_be_drawn_or_kept_costs_a_warning(elsewhere, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("lrsa_lit.tracking.artifacts.write_atomically", full)
    fit("csv")
    assert "the picture of the scores is missing: OSError: No space left on device" in caplog.text
