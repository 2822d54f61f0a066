"""A sentence encoder from YAML to a checkpoint, and from the checkpoint to what it is measured by."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER, before_step, ctrl_c, recorded_runs, refusal
from sentence_questions import written

from lrsa_lit.cli.main import main
from lrsa_lit.tasks import SentenceRetrieval

SHIPPED = ["--task", "sentence_retrieval", "--config", "tiny.yaml"]


@pytest.fixture(autouse=True)
def _settings(elsewhere):
    trainer = {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    model = {"backbone": {"source": "tiny"}, "max_tokens": 400, "optimizer": {"init_args": {"lr": 0.01}}}
    data = {"init_args": written(Path("questions.json")) | {"batch_size": 4}}
    Path("tiny.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": data}))


def fit(folder, *options):
    main(["fit", *SHIPPED, "--trainer.default_root_dir", folder, *options])


def last(folder):
    return next(Path(folder).rglob("last.ckpt"))


@pytest.mark.parametrize("lora", [True, False])
def test_a_stopped_fit_goes_on_to_the_same_bits(lora):
    options = [*NO_LOGGER, *([] if lora else ["--model.backbone.lora", "null"])]
    fit("whole", *options)
    with before_step(3, ctrl_c, SentenceRetrieval), pytest.raises(SystemExit, match="130"):
        fit("halves", *options)
    fit("halves", *options, "--ckpt_path", str(last("halves")))
    whole, halves = (torch.load(last(folder), weights_only=True) for folder in ("whole", "halves"))
    assert whole["global_step"] == halves["global_step"] == 4
    assert whole["state_dict"].keys() == halves["state_dict"].keys()
    assert all(("lora" in name) == lora for name in whole["state_dict"])
    assert all(torch.equal(weight, halves["state_dict"][name]) for name, weight in whole["state_dict"].items())
    pairs = zip(*(each["optimizer_states"][0]["state"].values() for each in (whole, halves)), strict=True)
    assert all(torch.equal(value, other[name]) for state, other in pairs for name, value in state.items())


def test_a_fit_is_recorded_and_its_checkpoint_tested(capsys):
    fit("runs", "--trainer.logger.experiment_name", "encoders")
    shown = capsys.readouterr().out
    assert "recall at 10 %" in shown
    assert "lrsa test --task sentence_retrieval" in shown
    (run,) = recorded_runs(Path("runs/mlflow.db"), "encoders")
    assert run.info.run_name == "tiny-encoder-s0"
    assert {
        "val/recall_10",
        "val/recall_25",
        "val/recall",
        "val/bm25/recall_10",
        "train/loss/masked",
    } <= run.data.metrics.keys()
    main(["test", *SHIPPED, "--ckpt_path", str(last("runs")), "--config", "configs/logger/csv.yaml"])
    shown = capsys.readouterr().out
    assert "Test on 4 questions" in shown
    assert "Encoder over BM25 at 10 %" in shown
    lines = [json.loads(line) for line in next(Path("runs").rglob("recalls.jsonl")).read_text().splitlines()]
    assert [line["supporting"] for line in lines] == [2] * 4
    assert lines[0]["encoder"].keys() == {"10", "25"}


def test_weights_are_those_that_were_trained(capsys):
    def recall(*options):
        capsys.readouterr()
        main(["test", *SHIPPED, *NO_LOGGER, "--model.budgets", "[0.3]", "--trainer.callbacks", "[]", *options])
        return capsys.readouterr().out

    fit("runs", *NO_LOGGER, "--trainer.max_steps", "12", "--trainer.val_check_interval", "12")
    saved = torch.load(last("runs"), weights_only=True)
    assert saved["lrsa_lit"]["encoder"] == {"max_tokens": 400}
    assert recall("--ckpt_path", str(last("runs"))) != recall()


def test_help(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--task", "sentence_retrieval", "--help"])
    shown = capfd.readouterr().out
    for key in ("--model.backbone.source", "--model.masked_share", "--data.batch_size", "--data.val_fraction"):
        assert key in shown
    assert "lag_size" not in shown


def test_refusals(capfd):
    options = ["fit", *SHIPPED, *NO_LOGGER]
    assert refusal(capfd, *options, "--model.mask", "__").startswith("model.mask: '__' is not allowed")
    assert "model.max_tokens" in refusal(capfd, *options, "--model.max_tokens", "9000")
    assert "read in one pass" in refusal(capfd, *options, "--data.max_tokens", "401")
    assert refusal(capfd, *options, "--best_by", "f1") == "best_by: 'f1' is not allowed; it must be recall"
    assert "no such setting" in refusal(capfd, *options, "--model.lrsa.top_k", "3")
    assert refusal(capfd, "fit", "--task", "sentences").startswith("task: 'sentences' is not allowed")
    assert "answers to predict" in refusal(capfd, "predict", *SHIPPED, *NO_LOGGER)
    assert "question_answering" in refusal(capfd, "distil-cache", *SHIPPED)
    assert not [path for path in Path().rglob("runs/**/*") if path.is_file()]


def test_an_encoder_answers_nothing(capfd):
    fit("runs", *NO_LOGGER, "--trainer.max_steps", "1")
    lora = [
        "--model.backbone.lora.rank",
        "16",
        "--model.backbone.lora.alpha",
        "32",
        "--model.backbone.lora.dropout",
        "0.05",
    ]
    qa = ["test", *DEBUG, *NO_LOGGER, *lora, "--ckpt_path", str(last("runs"))]
    assert "an encoder trained by a fit with task sentence_retrieval" in refusal(capfd, *qa)
    Path("text.txt").write_text("A text.")
    told = refusal(capfd, "ask", "--model", str(last("runs")), "text.txt", "What?")
    assert "is a sentence encoder, which cannot answer" in told
    export = refusal(capfd, "export", str(last("runs")), "--out", "model")
    assert "the filter CPC" in export
