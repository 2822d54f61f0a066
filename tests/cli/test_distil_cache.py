"""``lrsa distil-cache``: the line that a fit without a cache names, and what it refuses."""

import json
import shlex

import pytest
import torch
from cli_helpers import DEBUG, NO_LOGGER, refusal

from lrsa_lit.cli.main import main
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

FIT = [*DEBUG, *NO_LOGGER, "--validate_first", "false", "--data.init_args.val", "null"]


@pytest.fixture
def teacher(tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def objective(**init_args):
    settings = {"class_path": "lrsa_lit.objectives.Distillation", "init_args": init_args}
    return ["--model.objective", json.dumps(settings)]


def weights(folder, *options):
    main(["fit", *FIT, *options, "--trainer.default_root_dir", str(folder)])
    return load_trained(folder / "checkpoints" / "last.ckpt").weights


def test_a_fit_without_a_cache_names_the_line_that_makes_it(teacher, tmp_path, capfd, monkeypatch):
    kept = objective(teacher=str(teacher), top_n=8, teacher_dtype="float32", cached=True)
    line = refusal(capfd, "fit", *FIT, *kept)
    refused, _, made_by = line.partition("; make it with: lrsa ")
    assert refused == f"model.objective.teacher: {str(teacher)!r} is not cached"
    main(shlex.split(made_by))
    assert str(tmp_path / "cache" / "data") in capfd.readouterr().out.splitlines()[-2]
    assert not [*tmp_path.glob("runs/**/*")], "no run"
    expected = weights(tmp_path / "asked", *objective(teacher=str(teacher), top_n=8, teacher_dtype="float32"))
    monkeypatch.setattr("lrsa_lit.objectives.teachers.Loaded.run", None)
    found = weights(tmp_path / "read", *kept)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=2e-4)
    line = refusal(capfd, "fit", *FIT, *kept, "--data.init_args.seed", "1", "--data.init_args.limit.train", "2")
    assert "is cached only for other data" in line
    assert "--data.init_args.limit.train 2" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "model.objective: has no Distillation"),
        (objective(top_n=8), "model.objective.teacher: 'self' is not allowed"),
        (objective(teacher="tiny"), "model.objective.top_n: 'null' is not allowed"),
        (objective(teacher="./nowhere", top_n=8), "model.objective.teacher: "),
        ([*objective(teacher="tiny", top_n=8), "--estimate"], "--estimate: it is not allowed for distil-cache"),
        (["--model.lrsa.top_q", "3"], "model.lrsa.top_q"),
    ],
)
def test_what_has_no_teacher_to_keep(options, said, capfd):
    assert said in refusal(capfd, "distil-cache", *FIT, *options)
