"""The callback, by runs of the command line."""

from pathlib import Path

import numpy as np
import pytest
from cli_helpers import DEBUG, WHOLE, elsewhere, forwards, recorded_runs  # noqa: F401 - a fixture
from helpers import refused

from lrsa_lit.analysis.callback import CaptureSelections
from lrsa_lit.analysis.capture import record
from lrsa_lit.analysis.metrics import survival
from lrsa_lit.analysis.record import SelectionRecord
from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.cli.main import main
from lrsa_lit.data.collate import collate
from lrsa_lit.data.prompts import encode
from lrsa_lit.data.records import read_records
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.paths import shipped

CAPTURE = ["--config", "configs/experiment/selections.yaml"]


def test_before_and_after_training_are_artifacts_and_metrics(tmp_path):
    main(["fit", *WHOLE, *CAPTURE])
    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    folder = next((tmp_path / "runs/artifacts").rglob("selections"))
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        f"step00000{step}{kind}" for step in (0, 4) for kind in (".npz", "-positions.png", "-survival.png")
    )
    before, after = (SelectionRecord.load(folder / f"step00000{step}.npz") for step in (0, 4))
    assert (before.model, before.step, after.step) == ("tiny", 0, 4)

    found = survival(after, "gold")
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith("selection/")}
    assert metrics["selection/gold_kept"] == pytest.approx(found.mean)
    assert metrics["selection/gold_kept_anywhere"] == pytest.approx(found.anywhere)
    assert metrics["selection/answer_kept"] == pytest.approx(survival(after, "answer").mean)
    assert metrics["selection/chance"] == 0.25
    assert metrics["selection/chance_anywhere"] == pytest.approx(1 - 0.75**4)

    # The weights that the run saved keep what the run says, under its rule and not under a training one.
    model = enable(load_trained(next((tmp_path / "runs").rglob("last.ckpt"))).build(), LRSAConfig(4, 32, 8))
    examples = [encode(each, tiny_tokenizer(), 4096) for each in read_records(shipped("data/sample.jsonl"))]
    again = record(model, [collate(examples, 2)], tiny_tokenizer(), name="tiny", step=4)
    for ours, theirs in zip(again.samples, after.samples, strict=True):
        assert (ours.id, ours.gold_spans, ours.answer_spans) == (theirs.id, theirs.gold_spans, theirs.answer_spans)
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)


def test_it_costs_a_forward_of_the_samples_and_no_other(tmp_path):
    Path("three.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: lrsa_lit.analysis.callback.CaptureSelections\n"
        "      init_args: {samples: 3, figures: false}\n"
    )
    batches = ["--data.init_args.eval_batch_size", "2", "--data.init_args.limit", "{val: 4}"]
    without = forwards(*batches)
    assert not list(tmp_path.rglob("selections"))
    # Three samples lie in two batches, and are recorded twice.
    assert forwards(*batches, "--config", "three.yaml") == without + 4
    files = sorted((tmp_path / "runs/fit-1/selections").iterdir())
    assert [file.name for file in files] == ["step000000.npz", "step000004.npz"]
    ids = [each.id for each in read_records(shipped("data/sample.jsonl"))]
    assert [sample.id for sample in SelectionRecord.load(files[0]).samples] == ids[:3]


def test_a_store_that_takes_no_artifacts_does_not_stop_training(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    log_artifact = MlflowClient.log_artifact

    def refuse(self, run_id, path, artifact_path=None):
        if artifact_path == "selections":
            raise ConnectionError("no route to the store")
        log_artifact(self, run_id, path, artifact_path)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    monkeypatch.setattr("lrsa_lit.tracking.logger._SAVE_SECONDS", 0.2)
    monkeypatch.setattr("lrsa_lit.tracking.logger._FLUSH_SECONDS", 1.0)
    main(["fit", *DEBUG, *CAPTURE])
    assert len(list(tmp_path.rglob("selections/step*.npz"))) == 2
    assert any("no route to the store" in message for message in caplog.messages)


def test_a_number_of_samples_that_is_none():
    with refused("samples", 0):
        CaptureSelections(samples=0)
