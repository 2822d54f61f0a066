"""Learned spectra from YAML to a narrow model, and through stops."""

import json
from pathlib import Path

import processes
import pytest
import torch
import yaml
from cli_helpers import NO_LOGGER, before_step, ctrl_c, recorded_runs, refusal
from experiments.tiny_study import merged

from lrsa_lit.cli.main import main

SETTINGS = {
    "trainer": {"max_steps": 24, "val_check_interval": 12, "accelerator": "cpu", "log_every_n_steps": 1,
                "logger": {"init_args": {"experiment_name": "spectra"}}},
    "model": {
        "backbone": {"source": "tiny"},
        "objective": {"init_args": {"positions": 64}},
        "optimizer": {"init_args": {"lr": 0.5}},
        "generate_answers": False,
    },
    "data": {"class_path": "lrsa_lit.data.QAFiles",
             "init_args": {"max_tokens": 900, "limit": {"train": 4, "val": 1, "test": 1},
                           **dict.fromkeys(("train", "val", "test"), "data/sample.jsonl")}},
}  # fmt: skip
SHIPPED = ["--config", "configs/experiment/soco.yaml", "--config", "tiny.yaml"]
ONCE = [*NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null"]


@pytest.fixture(autouse=True)
def _settings(elsewhere):
    saving = {"class_path": "lrsa_lit.checkpoints.SafeModelCheckpoint",
              "init_args": {"monitor": "val/loss", "save_last": True, "save_on_exception": True}}  # fmt: skip
    log = {"class_path": "lrsa_lit.tracking.LogModel"}
    of_answers = {key: value for key, value in SETTINGS["model"].items() if key not in ("objective", "optimizer")}
    of_answers["lr_scheduler"] = None
    Path("plain.yaml").write_text(
        yaml.safe_dump(merged(SETTINGS | {"model": of_answers}, {"trainer": {"callbacks": [saving]}}))
    )
    Path("tiny.yaml").write_text(yaml.safe_dump(merged(SETTINGS, {"trainer": {"callbacks": [saving, log]}})))


def fit(folder, *options):
    main(["fit", *SHIPPED, "--trainer.default_root_dir", folder, *options])


def last(folder):
    return next(Path(folder).rglob("last.ckpt"))


def losses(found):
    """The closing table's line, under the run's own attention and dense."""
    (line,) = [line for line in found.out.splitlines() if "answer loss" in line and "│ all" in line]
    return line.split("│")[-3:-1]


def test_a_fit_that_stops_at_each_border_of_its_phases_goes_on_to_the_same_scores(elsewhere):
    """They end behind 7, 17 and 24 steps; from 10 on the second one lets the model recover."""
    fit("whole", *ONCE)
    for number, step in enumerate((7, 12, 17)):
        with before_step(step, ctrl_c), pytest.raises(SystemExit, match="130"):
            fit("parts", *ONCE, *(["--ckpt_path", str(last("parts"))] if number else []))
        assert torch.load(last("parts"), weights_only=True)["global_step"] == step
    fit("parts", *ONCE, "--ckpt_path", str(last("parts")))
    whole, parts = (torch.load(last(folder), weights_only=True) for folder in ("whole", "parts"))
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(weight.equal(parts["state_dict"][name]) for name, weight in whole["state_dict"].items())
    for number, state in whole["optimizer_states"][0]["state"].items():
        assert all(
            torch.equal(held, parts["optimizer_states"][0]["state"][number][name]) for name, held in state.items()
        )


def test_a_checkpoint_is_evaluated_exported_asked_and_gone_on_from(elsewhere, capfd):
    fit("runs")
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "spectra")
    assert run.info.run_name == "tiny-dense-soco0.5-L128-K32-s0"
    assert run.data.metrics["train/spectra/phase"] == 3.0
    assert 0.0 < run.data.metrics["train/spectra/ratio"] < 1.1
    capfd.readouterr()
    checkpoint = str(last("runs"))
    main(["test", *SHIPPED, *NO_LOGGER, "--ckpt_path", checkpoint])
    by_checkpoint = losses(capfd.readouterr())
    main(["export", checkpoint, "--out", "narrow"])
    assert json.loads(Path("narrow/config.json").read_text())["attention_bias"]
    plain = ["--config", "plain.yaml", *NO_LOGGER]
    capfd.readouterr()
    main(["test", *plain, "--model.backbone.source", "narrow"])
    assert losses(capfd.readouterr()) == by_checkpoint
    Path("text.txt").write_text("Ann has a cat.")
    answers = []
    for model in (checkpoint, "narrow"):
        capfd.readouterr()
        main(["ask", "--json", "text.txt", "Who has a cat?", "--model", model, "--max-new-tokens", "4"])
        answers.append(json.loads(capfd.readouterr().out.splitlines()[-1])["answer"])
    assert answers[0] == answers[1]
    # All weights of the narrow model.
    steps = ["--trainer.max_steps", "1", "--validate_first", "false", "--data.init_args.val", "null"]
    main(["fit", *plain, *steps, "--model.start_from", checkpoint, "--trainer.default_root_dir", "tuned"])
    found = torch.load(last("tuned"), weights_only=True)["state_dict"]
    ranks = [len(weight) for name, weight in found.items() if name.endswith("down.weight")]
    assert sum(ranks) <= 64
    assert len(set(ranks)) > 1
    # Nothing else says which ranks these are.
    for again in ("test", "fit"):
        options = ["--trainer.max_steps", "2", "--data.init_args.val", "null"] if again == "fit" else []
        main([again, *plain, *options, "--ckpt_path", str(last("tuned"))])


def test_what_spectra_do_not_go_with_is_told_in_one_line(capfd):
    error = refusal(capfd, "fit", *SHIPPED, "--estimate")
    assert error == "--estimate: model.spectra cannot be estimated"
    error = refusal(capfd, "fit", *SHIPPED, "--model.spectra.init_args.ratio", "0")
    assert error == "model.spectra.init_args.ratio: 0.0 is not allowed; it must be above 0 and at most 1"
    error = refusal(capfd, "fit", *SHIPPED, "--model.spectra.init_args.ratio", "0.01")
    assert error.startswith("model.spectra.init_args.ratio: 0.01 is not allowed; it must be at least 0.0312")
    error = refusal(capfd, "fit", *SHIPPED, "--model.spectra.init_args.phases", "[0.5, 0.5]")
    assert error.startswith("model.spectra.init_args.phases: [0.5, 0.5] is not allowed; it must be three shares")
    error = refusal(capfd, "fit", *SHIPPED, "--trainer.max_steps", "2")
    assert "leaves a phase without a step; trainer.max_steps is 2" in error
    error = refusal(capfd, "fit", *SHIPPED, "--model.spectra.init_args.dense_layers", "[7]")
    assert error.startswith("model.spectra.init_args.dense_layers: [7] is not allowed; it must be from 0 to 1")
    error = refusal(capfd, "fit", *SHIPPED, "--model.backbone.lora", "{rank: 2}")
    assert error == "model.backbone.lora: is not allowed with spectra: all weights are frozen"
    error = refusal(capfd, "fit", *SHIPPED, "--model.objective.init_args.adapters", "true")
    assert error.startswith("model.objective: a model that trains with dense attention cannot learn from itself")
    error = refusal(capfd, "fit", *SHIPPED, "--config", "configs/trainer/fsdp.yaml", "--trainer.devices", "1")
    assert error == "trainer.strategy: cannot train model.spectra, because it shards the model"
    one_rate = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 24}}
    Path("rate.yaml").write_text(yaml.safe_dump({"model": {"lr_scheduler": one_rate}}))
    error = refusal(capfd, "fit", *SHIPPED, "--config", "rate.yaml")
    assert error.startswith("model.lr_scheduler: 'OneCycleLR' is not allowed; it must be a schedule that scales")
    assert not list(Path("runs").rglob("*"))


@pytest.mark.slow
def test_two_devices_train_the_spectra_that_one_trains(elsewhere):
    # At first the teacher says the very same. AdamW would make steps of the rounding of a gradient of zero, and so
    # would a high rate; the ratio moves the scores.
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    Path("sgd.yaml").write_text(yaml.safe_dump({"model": {"optimizer": optimizer}}))
    options = [*ONCE, "--config", "sgd.yaml", "--trainer.gradient_clip_val", "0", "--trainer.max_steps", "4",
               "--model.spectra.init_args.ratio_weight", "40000"]  # fmt: skip
    fit("one", *options, "--data.init_args.batch_size", "2")
    two = ["--config", "configs/trainer/ddp.yaml", "--trainer.devices", "2"]
    processes.run(["fit", *SHIPPED, *two, *options, "--trainer.default_root_dir", "two"], elsewhere)
    one, two = (torch.load(last(folder), weights_only=True)["state_dict"] for folder in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert any(weight.abs().max() > 0.01 for name, weight in one.items() if name.endswith("logits"))
