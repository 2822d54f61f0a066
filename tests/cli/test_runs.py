"""Runs of the command line, in process, with the shipped YAMLs."""

import json
import re
import signal
import sys

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, WHOLE, before_step, ctrl_c, recorded_runs

from lrsa_lit.cli.main import main

# Validations are there, but of one question.
BRIEF = [*DEBUG, *NO_LOGGER, "--data.init_args.limit", "{val: 1}"]


def test_fit_then_test_then_predict_then_validate(tmp_path, capfd):
    main(["fit", *WHOLE])
    shown = capfd.readouterr().out
    assert "Validation on 8 questions, step 0 → step 4" in shown
    assert re.search(r"LRSA .* → ", shown)
    assert re.search(r"dense .* → ", shown)
    assert f"sqlite:///{tmp_path}/runs/mlflow.db" in shown

    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    assert run.data.params["model.lrsa.top_k"] == "8"
    assert run.data.params["model.lrsa.lag_size"] == "32"
    assert run.data.tags["seed"] == "0"
    assert run.data.tags["version.torch"] == torch.__version__
    assert run.info.run_name == "tiny-L32-K8-s0"
    expected = {f"val/{name}" for name in ("loss", "f1", "em", "recall", "dense/loss", "dense/f1")}
    assert expected | {"train/loss", "train/lr"} <= set(run.data.metrics)
    assert run.data.metrics["val/loss"] != run.data.metrics["val/dense/loss"]
    # What attentions take is the same in all validations of a fit.
    assert not {"val/cache", "val/dense/pairs", "val/token_seconds"} & set(run.data.metrics)

    checkpoint = next((tmp_path / "runs").rglob("last.ckpt"))
    main(["test", *WHOLE, "--ckpt_path", str(checkpoint), *NO_LOGGER])
    assert "Test on 8 questions" in capfd.readouterr().out

    main(["predict", *WHOLE, "--ckpt_path", str(checkpoint), *NO_LOGGER])
    lines = [json.loads(line) for line in (tmp_path / "runs/predict-1/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    fields = {"id", "prediction", "gold", "f1", "exact_match", "prompt_tokens", "new_tokens", "config"}
    assert set(lines[0]) == fields
    assert not list((tmp_path / "runs").rglob("*.partial"))

    main(["validate", *WHOLE, "--ckpt_path", str(checkpoint), *NO_LOGGER])
    assert "Validation on 8 questions" in capfd.readouterr().out


def test_recorded_config_repeats_the_run(tmp_path):
    main(["fit", *DEBUG, "--seed_everything", "3", "--model.lrsa.top_k", "5"])
    (first,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    recorded = next((tmp_path / "runs/artifacts").rglob("config.yaml"))

    main(["fit", "--config", str(recorded)])
    second, _ = recorded_runs(tmp_path / "runs/mlflow.db", "debug")

    assert second.data.params == first.data.params
    assert second.data.metrics["train/loss"] == first.data.metrics["train/loss"]
    assert second.data.metrics["val/loss"] == first.data.metrics["val/loss"]


def test_checkpoint_keeps_what_the_user_asks_for(tmp_path, capfd):
    main(["fit", *BRIEF])
    checkpoint = str(next((tmp_path / "runs").rglob("last.ckpt")))
    capfd.readouterr()
    losses = []
    for top_k in ("8", "2"):
        main(["test", *DEBUG, *NO_LOGGER, "--ckpt_path", checkpoint, "--model.lrsa.top_k", top_k])
        losses.append(re.search(r"answer loss\D*([\d.]+)", capfd.readouterr().out)[1])
    assert losses[0] != losses[1]


def test_lora_with_gradient_checkpointing_saves_adapters_only(tmp_path):
    main(
        [
            "fit",
            *BRIEF,
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
            *BRIEF,
            "--model.backbone.lora",
            "{rank: 4}",
            "--ckpt_path",
            str(next((tmp_path / "runs").rglob("last.ckpt"))),
        ]
    )


@pytest.mark.parametrize(
    "compressor", ["LagRelative", "ValueRelative", "ChunkWise", "RandomTokens", "Recency", "Strided", "MeanPool"]
)
def test_each_compressor_is_a_yaml_line(compressor):
    main(
        [
            "fit",
            *BRIEF,
            "--model.lrsa.compressor",
            compressor,
            "--trainer.max_steps",
            "1",
            "--trainer.val_check_interval",
            "1",
        ]
    )


@pytest.mark.parametrize(
    "schedule",
    [
        "{class_path: SampledTopK, init_args: {choices: [4, 8, 32]}}",
        "{class_path: AnnealedTopK, init_args: {steps: 2}}",
    ],
)
def test_k_may_change_from_step_to_step_by_yaml(schedule):
    main(["fit", *BRIEF, "--model.train_top_k", schedule, "--trainer.max_steps", "3"])


def test_dense_training_and_several_budgets_in_one_evaluation(tmp_path):
    main(["fit", *DEBUG, "--model.train_attention", "null", "--model.evaluate", "{dense: null, k4: {top_k: 4}}"])
    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    metrics = run.data.metrics
    assert len({metrics["val/loss"], metrics["val/dense/loss"], metrics["val/k4/loss"]}) == 3
    assert run.info.run_name == "tiny-dense-L32-K8-s0"


def test_fit_without_mlflow_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    main(["fit", *BRIEF])


def test_after_is_measured_after_the_last_step(capfd):
    main(["fit", *BRIEF, "--trainer.max_steps", "3"])
    assert "step 0 → step 3" in capfd.readouterr().out


def test_seed_changes_the_order_but_not_the_examples(tmp_path):
    losses = []
    for seed in ("0", "3"):
        main(["fit", *DEBUG, "--seed_everything", seed, "--trainer.max_steps", "2", "--validate_first", "false"])
    for run in recorded_runs(tmp_path / "runs/mlflow.db", "debug"):
        losses.append(run.data.metrics["train/loss"])
        assert run.info.status == "FINISHED"
    assert len({run.data.tags["data"] for run in recorded_runs(tmp_path / "runs/mlflow.db", "debug")}) == 1
    assert losses[0] != losses[1]


def test_interrupt_loses_nothing_and_says_how_to_go_on(tmp_path, capfd):
    with before_step(2, ctrl_c), pytest.raises(SystemExit, match="130"):
        main(["fit", *BRIEF])
    said = re.search(r"interrupted at step 2; continue with --ckpt_path (\S+)", capfd.readouterr().err)
    main(["fit", *BRIEF, "--ckpt_path", said[1]])
    assert "step 4" in capfd.readouterr().out


def test_an_interrupted_evaluation_names_no_step(capfd, monkeypatch):
    from lrsa_lit.tasks import LongContextQA

    def interrupted(self, batch, batch_idx):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(LongContextQA, "test_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["test", *DEBUG, *NO_LOGGER])
    signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 130
    assert "lrsa: interrupted\n" in capfd.readouterr().err


def test_mixed_precision_runs(capfd):
    main(["fit", *BRIEF, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "2"])
    assert "step 0 → step 2" in capfd.readouterr().out


def test_a_single_validation_is_shown_as_one_and_the_last_checkpoint_named(tmp_path, capfd):
    main(["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.max_steps", "2"])
    shown = capfd.readouterr().out
    assert "Validation on 2 questions, step 2" in shown
    assert "→" not in shown
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert f"Last checkpoint: {checkpoint.relative_to(tmp_path)}" in shown
    assert "Best checkpoint" not in shown


def test_training_without_validation_data(capfd):
    main(["fit", *DEBUG, *NO_LOGGER, "--data.init_args.val", "null", "--trainer.max_steps", "2"])
    assert "lrsa: error" not in capfd.readouterr().err
