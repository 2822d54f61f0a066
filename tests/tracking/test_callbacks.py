"""Speed, answers and the machine, as a fit records them."""

import json
import threading

import pytest
import torch
from cli_helpers import DEBUG, WHOLE, before_step, recorded_runs
from mlflow.tracking import MlflowClient

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.models.flops import Shape, training_flops
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking import MLflowRun, performance
from lrsa_lit.tracking.samples import table_row

RULE = LRSAConfig(sink_size=4, lag_size=32, top_k=8)
ONE_IN_THE_TABLE = "[{class_path: lrsa_lit.tracking.SamplePredictions, init_args: {count: 1}}]"
QUIET = ["--validate_first", "false"]


class Clock:
    """Time passes only where a test lets it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Each training step takes 2 seconds, each validation 1000."""
    clock = Clock()
    step, validation = LongContextQA.training_step, LongContextQA.validation_step
    batches = []

    def slow_step(self, batch, batch_idx):
        clock.now += 2
        batches.append(batch)
        return step(self, batch, batch_idx)

    def slow_validation(self, batch, batch_idx):
        clock.now += 1000
        return validation(self, batch, batch_idx)

    monkeypatch.setattr(performance, "time", clock)
    monkeypatch.setattr(LongContextQA, "training_step", slow_step)
    monkeypatch.setattr(LongContextQA, "validation_step", slow_validation)
    return batches


def history(store, run, name):
    return [
        (metric.step, metric.value)
        for metric in MlflowClient(f"sqlite:///{store}").get_metric_history(run.info.run_id, name)
    ]


def test_speed_by_a_known_clock(elsewhere, clock, monkeypatch):
    monkeypatch.setattr(performance, "peak_flops", lambda name: 1e9)
    main(["fit", *DEBUG, *QUIET, "--data.init_args.batch_size", "2", "--trainer.val_check_interval", "2"])
    store = elsewhere / "runs/mlflow.db"
    (run,) = recorded_runs(store, "debug")
    tokens = [int(batch["attention_mask"].sum()) for batch in clock]
    assert [value for _, value in history(store, run, "perf/step_seconds")] == [2.0] * 4
    assert [value for _, value in history(store, run, "perf/tokens_per_second")] == [count / 2 for count in tokens]
    shape = Shape.of(tiny_model())
    for batch, (_, mfu) in zip(clock, history(store, run, "perf/mfu"), strict=True):
        answers = int((batch["labels"] != -100).sum())
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert mfu == pytest.approx(training_flops(shape, lengths, answers, RULE) / 2 / 1e9)
    losses = history(store, run, "train/loss")
    assert [step for step, _ in history(store, run, "perf/mfu")] == [step for step, _ in losses]
    assert 0.05 < run.data.metrics["perf/peak_memory_gib"] < 100


def test_steps_of_several_batches_between_logged_ones(elsewhere, clock):
    options = ["--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "2"]
    main(["fit", *DEBUG, *QUIET, *options, "--trainer.val_check_interval", "8"])
    store = elsewhere / "runs/mlflow.db"
    (run,) = recorded_runs(store, "debug")
    tokens = [int(batch["attention_mask"].sum()) for batch in clock]
    assert len(tokens) == 8
    assert [value for _, value in history(store, run, "perf/step_seconds")] == [4.0] * 2
    expected = [sum(tokens[:4]) / 8, sum(tokens[4:]) / 8]
    assert [value for _, value in history(store, run, "perf/tokens_per_second")] == expected


def test_no_mfu_where_the_peak_is_unknown(elsewhere):
    main(["fit", *DEBUG, *QUIET])
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    assert "perf/mfu" not in run.data.metrics
    assert run.data.metrics["perf/tokens_per_second"] > 0
    assert torch.cuda.is_available() or "perf/peak_memory_gib" in run.data.metrics


def test_sample_predictions_of_each_validation(elsewhere):
    main(["fit", *WHOLE, "--data.init_args.eval_batch_size", "3"])
    (path,) = (elsewhere / "runs/artifacts").rglob("predictions.json")
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["step"] for row in rows] == [0] * 8 + [4] * 8
    assert [row["id"] for row in rows[:8]] == [row["id"] for row in rows[8:]]
    assert set(rows[0]) == {"step", "id", "question", "gold", "LRSA", "LRSA F1", "dense", "dense F1"}
    records = [json.loads(line) for line in (elsewhere / "records.jsonl").read_text().splitlines()]
    by_id = {record["id"]: record for record in records}
    for row in rows:
        assert row["question"] == by_id[row["id"]]["question"]
        assert row["gold"] == " | ".join(by_id[row["id"]]["answers"])


def test_all_answers_of_the_last_validation(elsewhere):
    main(["fit", *WHOLE, "--data.init_args.eval_batch_size", "3", "--trainer.callbacks", ONE_IN_THE_TABLE])
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    (path,) = (elsewhere / "runs/artifacts").rglob("val.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [4] * 8
    assert len({row["id"] for row in rows}) == 8
    records = map(json.loads, (elsewhere / "records.jsonl").read_text().splitlines())
    assert {row["question"] for row in rows} <= {record["question"] for record in records}
    for name in ("LRSA", "dense"):
        assert set(rows[0][name]) == {"prediction", "f1", "em"}
    for metric in ("f1", "em"):
        assert sum(row["dense"][metric] for row in rows) / 8 == pytest.approx(run.data.metrics[f"val/dense/{metric}"])
    (table,) = (elsewhere / "runs/artifacts").rglob("predictions.json")
    assert len(json.loads(table.read_text())["data"]) == 2


def test_the_table_has_the_end_of_a_long_question():
    row = {"step": 1, "id": "a", "question": "x" * 500 + "?", "LRSA": {"prediction": "p", "f1": 0.5, "em": 0.0}}
    shown = {"step": 1, "id": "a", "question": "…" + "x" * 399 + "?", "LRSA": "p", "LRSA F1": 0.5}
    assert table_row(row) == shown
    assert table_row(row | {"question": "Where?"}) == shown | {"question": "Where?"}


@pytest.fixture(autouse=True)
def records(elsewhere):
    from lrsa_lit.paths import shipped

    (elsewhere / "records.jsonl").write_bytes(shipped("data/sample.jsonl").read_bytes())


def test_system_metrics_have_samples_and_the_thread_ends(elsewhere, monkeypatch):
    published = threading.Event()
    log = MLflowRun.log_metrics

    def logging(self, metrics, step=None):
        log(self, metrics, step)
        if any(name.startswith("workload/") for name in metrics):
            published.set()

    monkeypatch.setattr(MLflowRun, "log_metrics", logging)
    callback = "[{class_path: lrsa_lit.tracking.SystemMetrics, init_args: {seconds: 0.2}}]"
    with before_step(1, lambda: published.wait(60)):
        main(["fit", *DEBUG, *QUIET, "--trainer.callbacks", callback, "--trainer.enable_checkpointing", "false"])
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    assert run.data.metrics["workload/system_memory_usage_megabytes"] > 0
    assert "workload/cpu_utilization_percentage" in run.data.metrics
    # MLflow's pages list names by the alphabet, and what begins with system/ above all others.
    assert max(name for name in run.data.metrics if not name.startswith("workload/")) < "workload/"
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
