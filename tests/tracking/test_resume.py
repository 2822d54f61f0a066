"""A fit that is stopped and resumed is one run."""

from pathlib import Path

import pytest
from cli_helpers import DEBUG, before_step, ctrl_c, recorded_runs
from mlflow.tracking import MlflowClient

from lrsa_lit.cli.main import main
from lrsa_lit.tasks import LongContextQA

FIT = ["fit", *DEBUG, "--trainer.max_steps", "6", "--trainer.val_check_interval", "8"]


@pytest.fixture
def store(elsewhere):
    return elsewhere / "runs/mlflow.db"


def stopped(*options):
    """Run a fit that gets Ctrl-C in its fourth step."""
    with before_step(3, ctrl_c), pytest.raises(SystemExit, match="130"):
        main([*FIT, *options])


def last(elsewhere):
    return str(next((elsewhere / "runs").rglob("last.ckpt")))


def steps(store, run, name):
    client = MlflowClient(f"sqlite:///{store}")
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


def test_one_run_with_contiguous_steps(elsewhere, store):
    stopped()
    (run,) = recorded_runs(store, "debug")
    assert run.info.status == "KILLED"
    before = steps(store, run, "train/loss")

    main([*FIT, "--ckpt_path", last(elsewhere), "--trainer.log_every_n_steps", "1", "--model.lrsa.top_k", "4"])
    (run,) = recorded_runs(store, "debug")
    assert run.info.status == "FINISHED"
    after = steps(store, run, "train/loss")
    assert len(before) == 3
    assert after == list(range(before[0], before[0] + 6))
    assert steps(store, run, "perf/step_seconds") == after
    # A param keeps the value that the run began with.
    assert run.data.params["model.lrsa.top_k"] == "8"
    assert run.data.tags["override.model.lrsa.top_k"] == "4"
    assert "override.model.lrsa.lag_size" not in run.data.tags
    assert run.info.run_name == "tiny-L32-K8-s0"
    recorded = {path.name: path.read_text() for path in (elsewhere / "runs/artifacts").rglob("config*.yaml")}
    assert "top_k: 8" in recorded["config.yaml"]
    assert "top_k: 4" in recorded["config.resumed.yaml"]


def test_a_run_that_went_on_is_left_alone(elsewhere, store):
    stopped()
    first = last(elsewhere)
    kept = elsewhere / "kept.ckpt"
    kept.write_bytes(Path(first).read_bytes())
    main([*FIT, "--ckpt_path", first])
    main([*FIT, "--ckpt_path", str(kept)])
    second, original = recorded_runs(store, "debug")
    assert second.data.tags["resumed_from"] == original.info.run_id
    assert len(steps(store, original, "train/loss")) == 6
    assert len(steps(store, second, "train/loss")) == 3


def test_a_run_of_another_store_becomes_a_new_one(elsewhere, store):
    stopped()
    other = ["--trainer.logger.init_args.tracking_uri", f"sqlite:///{elsewhere}/other.db"]
    main([*FIT, *other, "--ckpt_path", last(elsewhere)])
    (run,) = recorded_runs(elsewhere / "other.db", "debug")
    assert run.info.status == "FINISHED"
    assert len(recorded_runs(store, "debug")) == 1


def test_evaluating_a_checkpoint_is_a_run_of_its_own(elsewhere, store):
    main(FIT)
    main(["test", *DEBUG, "--ckpt_path", last(elsewhere)])
    test, fit = recorded_runs(store, "debug")
    assert "test/f1" in test.data.metrics
    assert "test/f1" not in fit.data.metrics


def test_a_failing_fit_is_a_failed_run(store, monkeypatch):
    def broken(self, batch, batch_idx):
        raise RuntimeError("broken")

    monkeypatch.setattr(LongContextQA, "training_step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        main(FIT)
    (run,) = recorded_runs(store, "debug")
    assert run.info.status == "FAILED"
