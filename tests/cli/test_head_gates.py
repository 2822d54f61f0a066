"""Gates of heads from YAML to a file, and from the file to what reads it."""

import json
from pathlib import Path

import processes
import pytest
import torch
import yaml
from cli_helpers import NO_LOGGER, before_step, ctrl_c, recorded_runs, refusal
from experiments.tiny_study import STUDY, merged
from mlflow.tracking import MlflowClient

from lrsa_lit.cli.main import main

SETTINGS = {
    "trainer": {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "log_every_n_steps": 1,
                "logger": {"init_args": {"experiment_name": "gates"}}},
    "model": {
        "backbone": {"source": "tiny"},
        "head_gates": {"init_args": {"sink_size": 4, "recent": 30, "served": {"sink_size": 4, "recent": 30}}},
        "optimizer": {"init_args": {"lr": 0.1}},
        "generate_answers": False,
    },
    "data": {"class_path": "lrsa_lit.data.QAFiles",
             "init_args": {"max_tokens": 900, "limit": {"train": 4, "val": 1, "test": 1},
                           **dict.fromkeys(("train", "val", "test"), "data/sample.jsonl")}},
}  # fmt: skip
SHIPPED = ["--config", "configs/experiment/duo_gates.yaml", "--config", "tiny.yaml"]


@pytest.fixture(autouse=True)
def _settings(elsewhere):
    settings = merged(SETTINGS, {"trainer": {"callbacks": [saving()]}})
    Path("tiny.yaml").write_text(yaml.safe_dump(settings))


def saving():
    arguments = {"monitor": "val/loss", "save_last": True, "save_on_exception": True}
    return {"class_path": "lrsa_lit.checkpoints.SafeModelCheckpoint", "init_args": arguments}


def fit(folder, *options):
    main(["fit", *SHIPPED, "--trainer.default_root_dir", folder, *options])


def last(folder):
    return next(Path(folder).rglob("last.ckpt"))


def test_a_stopped_fit_goes_on_to_the_same_gates(elsewhere):
    fit("whole", *NO_LOGGER)
    with before_step(3, ctrl_c), pytest.raises(SystemExit, match="130"):
        fit("halves", *NO_LOGGER)
    fit("halves", *NO_LOGGER, "--ckpt_path", str(last("halves")))
    whole, halves = (torch.load(last(folder), weights_only=True) for folder in ("whole", "halves"))
    (name,) = whole["state_dict"]
    assert whole["state_dict"][name].equal(halves["state_dict"][name])
    assert not whole["state_dict"][name].eq(1).all()
    for states in zip(*(each["optimizer_states"][0]["state"][0].values() for each in (whole, halves)), strict=True):
        assert torch.equal(*states)
    files = [next(Path(folder).rglob("gates.json")) for folder in ("whole", "halves")]
    assert files[0].read_text() == files[1].read_text()
    assert torch.tensor(json.loads(files[0].read_text())).equal(whole["state_dict"][name])
    # Those of each checkpoint, and of the fit that was stopped.
    assert {path.name for path in Path("halves").rglob("step*.json")} == {f"step00000{n}.json" for n in (2, 3, 4)}


def losses(found):
    """The closing table's line, under the run's own attention and dense."""
    (line,) = [line for line in found.out.splitlines() if "answer loss" in line]
    return line.split("│")[-3:-1]


def test_a_file_says_what_the_checkpoint_says(elsewhere, capfd):
    fit("runs", "--validate_first", "false")
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "gates")
    assert run.info.run_name == "tiny-gates-s0"
    assert 0 <= run.data.metrics["train/gates/open"] <= 1
    assert run.data.metrics["train/loss/hidden"] < run.data.metrics["train/loss"]
    artifacts = MlflowClient(f"sqlite:///{elsewhere}/runs/mlflow.db").list_artifacts(run.info.run_id, "gates")
    assert [found.path for found in artifacts] == ["gates/gates.json", "gates/gates.png"]
    file = next(path for path in Path("runs").rglob("gates.json") if "artifacts" not in path.parts)

    capfd.readouterr()
    main(["test", *SHIPPED, *NO_LOGGER, "--ckpt_path", str(last("runs"))])
    by_checkpoint = losses(capfd.readouterr())
    served = {"gates": str(file), "sparsity": 0.5, "sink_size": 4, "recent": 30}
    system = {"class_path": "DuoAttention", "init_args": served}
    plain = {key: value for key, value in SETTINGS["model"].items() if key not in ("head_gates", "optimizer")}
    Path("served.yaml").write_text(yaml.safe_dump(SETTINGS | {"model": plain | {"lrsa": {"system": system}}}))
    main(["test", "--config", "served.yaml", *NO_LOGGER])
    assert losses(capfd.readouterr()) == by_checkpoint
    error = refusal(capfd, "ask", str(file), "What?", "--model", str(last("runs")))
    assert "holds gates of heads and no weights; name the base model" in error


def test_gates_of_trained_weights_are_evaluated_on_these(capfd):
    quick = [*NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null", "--trainer.max_steps", "1"]
    plain = {key: value for key, value in SETTINGS["model"].items() if key != "head_gates"}
    Path("dense.yaml").write_text(yaml.safe_dump(SETTINGS | {"model": plain | {"train_attention": None}}))
    rate = ["--model.lr_scheduler", "null", "--model.optimizer.init_args.lr", "0.01"]
    main(["fit", "--config", "dense.yaml", *quick, *rate, "--trainer.default_root_dir", "dense"])
    started = ["--model.start_from", str(last("dense"))]
    fit("gates", *quick, *started)
    capfd.readouterr()
    main(["test", "--config", "dense.yaml", *NO_LOGGER, "--ckpt_path", str(last("dense"))])
    wanted = losses(capfd.readouterr())[1]
    main(["test", *SHIPPED, *NO_LOGGER, *started, "--ckpt_path", str(last("gates"))])
    assert losses(capfd.readouterr())[1] == wanted
    main(["test", *SHIPPED, *NO_LOGGER, "--ckpt_path", str(last("gates"))])
    assert losses(capfd.readouterr())[1] != wanted


def test_what_gates_do_not_go_with_is_told_in_one_line(capfd):
    error = refusal(capfd, "fit", *SHIPPED, "--estimate")
    assert error == "--estimate: model.head_gates cannot be estimated"
    error = refusal(capfd, "fit", *SHIPPED, "--model.head_gates.init_args.recent", "0")
    assert error == "model.head_gates.init_args.recent: 0 is not allowed; it must be an integer >= 1"
    error = refusal(capfd, "fit", *SHIPPED, "--model.head_gates.init_args.recent", "900")
    assert error.startswith("model.head_gates.init_args.recent: 900 and sink_size ")
    error = refusal(capfd, "fit", *SHIPPED, "--model.objective", "LanguageModelLoss")
    assert error == "model.objective: is not allowed with head_gates: only gates are trained"
    error = refusal(capfd, "fit", *SHIPPED, "--config", "configs/trainer/fsdp.yaml", "--trainer.devices", "1")
    assert error == "trainer.strategy: cannot train model.head_gates, because it shards the model"
    gates = {"class_path": "lrsa_lit.tasks.HeadGates"}
    changes = {"rows": {"gates": {"model": {"head_gates": gates}}}}
    Path("study.yaml").write_text(yaml.safe_dump(merged(STUDY, changes), sort_keys=False))
    error = refusal(capfd, "study", "run", "study.yaml", "--part", "main")
    assert error.startswith("study.yaml: rows.gates.model.head_gates: rows train weights")


@pytest.mark.slow
def test_two_devices_train_the_gates_that_one_trains(elsewhere):
    options = [*NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null"]
    fit("one", *options, "--data.init_args.batch_size", "2", "--trainer.gradient_clip_val", "0")
    two = ["--config", "configs/trainer/ddp.yaml", "--trainer.devices", "2", "--trainer.gradient_clip_val", "0"]
    processes.run(["fit", *SHIPPED, *two, *options, "--trainer.default_root_dir", "two"], elsewhere)
    one, two = (
        torch.load(last(folder), weights_only=True)["state_dict"]["head_gates.gates"] for folder in ("one", "two")
    )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)
