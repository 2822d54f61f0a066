"""What is recorded with a run."""

from __future__ import annotations

import pytest

from lrsa_lit.errors import UserError
from lrsa_lit.tracking import MLflowRun, flatten, run_name

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


def test_long_values_are_cut_where_mlflow_cuts_them():
    assert len(flatten({"a": "x" * 400})["a"]) == 250


@pytest.mark.parametrize(
    ("train_attention", "name"),
    [({}, "SmolLM2-135M-Instruct-L128-K32-s4"), (None, "SmolLM2-135M-Instruct-dense-L128-K32-s4")],
)
def test_run_name(train_attention, name):
    assert run_name({**VALUES, "model": {**VALUES["model"], "train_attention": train_attention}}) == name


def test_store_is_made_beside_its_artifacts(tmp_path):
    logger = MLflowRun(experiment_name="e", tracking_uri=f"sqlite:///{tmp_path}/deep/store.db")
    logger.log_metrics({"val/f1": 0.5}, step=2)
    logger.experiment.log_text(logger.run_id, "hello", "note.txt")
    logger.finalize()
    assert (tmp_path / "deep/store.db").stat().st_size > 0
    assert next((tmp_path / "deep/artifacts").rglob("note.txt")).read_text() == "hello"
    assert logger.experiment.get_run(logger.run_id).data.metrics == {"val/f1": 0.5}


def test_mlflow_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--trainer\.logger=false"):
        MLflowRun()
