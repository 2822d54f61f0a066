"""Objectives from the command line: teachers that are loaded, mistakes."""

import json
import re

import pytest
from cli_helpers import DEBUG, NO_LOGGER, elsewhere, recorded_runs, refusal  # noqa: F401 - a fixture of each test
from mlflow.tracking import MlflowClient

from lrsa_lit.cli.main import main
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

QUIET = ["--validate_first", "false", "--data.init_args.val", "null"]
FIT = ["fit", *DEBUG, *NO_LOGGER, *QUIET]
KL = "lrsa_lit.objectives.Distillation"


def fit(folder, *options, steps=4):
    main([*FIT, *options, "--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(steps)])
    return folder / "checkpoints" / "last.ckpt"


def objective(**init_args):
    return ["--model.objective", json.dumps({"class_path": KL, "init_args": init_args})]


def test_each_term_is_recorded_and_in_the_closing_table(tmp_path, capfd):
    both = [{"class_path": "lrsa_lit.objectives.AnswerLoss"}, {"class_path": KL, "init_args": {"weight": 0.5}}]
    given = ["fit", *DEBUG, *QUIET, "--model.lr_scheduler", "null", "--trainer.log_every_n_steps", "1"]
    given += ["--model.objective", "Sum", "--model.objective.objectives", json.dumps(both)]
    main([*given, "--trainer.max_steps", "2"])
    main([*given, "--trainer.max_steps", "12", "--ckpt_path", "last"])
    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    client, means = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db"), {}
    for name in ("answers", "kl"):
        losses = [each.value for each in client.get_metric_history(run.info.run_id, f"train/loss/{name}")]
        assert len(losses) == 12
        means[name] = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    total = run.data.metrics["train/loss/answers"] + 0.5 * run.data.metrics["train/loss/kl"]
    assert run.data.metrics["train/loss"] == pytest.approx(total, rel=1e-5)
    shown = capfd.readouterr().out.split("mean of the last 10 batches")[1]
    for name, (first, last) in means.items():
        assert re.search(rf"{name} +│ +{first:.3f} │ +{last:.3f} ", shown)


def test_help_lists_objectives_and_the_settings_of_each(capfd):
    def shown(*options):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *options])
        assert stop.value.code == 0
        return " ".join(capfd.readouterr().out.split())

    every, listed = shown("--help-all"), shown("--help")
    for name in ("AnswerLoss", "LanguageModelLoss", "Distillation", "HiddenAlignment", "Sum"):
        assert f"lrsa_lit.objectives.{name}" in every
        assert f" {name} " in listed
    said = shown(f"--model.objective.help={KL}")
    assert "--model.objective.direction {forward,reverse}" in said
    assert "--model.objective.weight WEIGHT factor of the mean. (type: float, default: 1.0)" in said


def test_a_dense_fit_teaches(tmp_path, caplog):
    dense = fit(tmp_path / "dense", "--model.train_attention", "null")
    fit(tmp_path / "taught", *objective(teacher=str(dense), positions=100), steps=2)
    assert "runs with dense attention" not in caplog.text
    ruled = fit(tmp_path / "ruled")
    fit(tmp_path / "again", *objective(teacher=str(ruled), positions=100), steps=2)
    (line,) = [record.getMessage() for record in caplog.records if "runs with dense attention" in record.getMessage()]
    assert str(ruled) in line
    assert "'top_k': 8" in line


def test_a_folder_teaches(tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    fit(tmp_path / "taught", *objective(teacher=str(tmp_path / "folder"), teacher_dtype="float32"), steps=2)


def test_a_teacher_with_another_vocabulary(tmp_path, capfd):
    tiny_model().save_pretrained(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["further"])
    tokenizer.save_pretrained(tmp_path / "other")
    line = refusal(capfd, *FIT, *objective(teacher=str(tmp_path / "other")))
    assert "model.objective.teacher: " in line
    assert "different vocabulary (260 tokens)" in line


@pytest.mark.parametrize(
    ("init_args", "key", "value"),
    [
        ({"teacher": "./nowhere"}, "model.objective.teacher", "nowhere"),
        ({"teacher": "nothing.ckpt"}, "model.objective.teacher", "nothing.ckpt"),
        ({"positions": 5000}, "model.objective.positions", "5000"),
        ({"weight": -1.0}, "weight", "-1.0"),
        ({"direction": "sideways"}, "direction", "sideways"),
    ],
)
def test_mistakes_are_refused_before_a_run_begins(init_args, key, value, tmp_path, capfd):
    line = refusal(capfd, *FIT, *objective(**init_args), "--trainer.default_root_dir", str(tmp_path / "run"))
    assert key in line
    assert value in line
    assert not list(tmp_path.glob("run/*"))


def test_layers_that_the_model_does_not_have(capfd):
    alignment = {"class_path": "lrsa_lit.objectives.HiddenAlignment", "init_args": {"of_layers": [2]}}
    line = refusal(capfd, *FIT, "--model.objective", json.dumps(alignment))
    assert "model.objective.of_layers: 2 is not allowed" in line


def test_a_model_that_trains_dense_does_not_teach_itself(capfd):
    line = refusal(capfd, *FIT, "--model.train_attention", "null", *objective())
    assert "model.objective" in line
    assert "train_attention" in line


def test_only_objectives_are_objectives(capfd):
    line = refusal(capfd, *FIT, "--model.objective", json.dumps({"class_path": "torch.nn.Linear"}))
    assert "model.objective" in line
