"""IC-Former from YAML: both stages, evaluation under its digests, exact resuming, and what is refused."""

import json
from pathlib import Path

import processes
import pytest
import torch
import yaml
from cli_helpers import NO_LOGGER, before_step, ctrl_c, recorded_runs, refusal
from experiments.tiny_study import STUDY, merged

from lrsa_lit.cli.main import main
from lrsa_lit.models import Backbone
from lrsa_lit.models.tiny import tiny_model

SETTINGS = {
    "trainer": {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "log_every_n_steps": 1,
                "precision": "32-true"},
    "model": {"backbone": {"source": "tiny"}, "digests": {"init_args": {"count": 8, "chunk": 32, "layers": 1}}},
    "data": {"class_path": "lrsa_lit.data.QAFiles",
             "init_args": {"max_tokens": 900, "batch_size": 2, "limit": {"train": 8, "val": 2, "test": 2},
                           **dict.fromkeys(("train", "val", "test"), "data/sample.jsonl")}},
}  # fmt: skip
STAGES = {
    stage: ["--config", f"configs/experiment/icformer_{stage}.yaml", "--config", "tiny.yaml"]
    for stage in ("repeat", "answer")
}


@pytest.fixture(autouse=True)
def _settings(elsewhere):
    Path("tiny.yaml").write_text(yaml.safe_dump(SETTINGS))


def fit(stage, folder, *options):
    main(["fit", *STAGES[stage], "--trainer.default_root_dir", folder, *options])
    return next(Path(folder).rglob("last.ckpt"))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_both_stages_then_answers_from_digests(capfd, elsewhere):
    first = fit("repeat", "first", *NO_LOGGER)
    second = fit("answer", "second", "--model.start_from", str(first))
    before, after = map(weights, (first, second))
    assert before.keys() == after.keys()
    assert after["digests.ae"].equal(before["digests.ae"])
    assert after["digests.ae"].any()
    assert not before["digests.ft"].any()
    assert after["digests.ft"].any()
    assert not after["digests.reader.layers.0.q.weight"].equal(before["digests.reader.layers.0.q.weight"])
    capfd.readouterr()
    evaluated = [*STAGES["answer"], "--ckpt_path", str(second), "--trainer.default_root_dir", "second"]
    main(["test", *evaluated, "--model.evaluate", "{dense: null, rule: {lag_size: 32, top_k: 8}}"])
    table = capfd.readouterr().out
    assert all(name in table for name in ("ICFormer", "dense", "rule", "cache, of dense bytes"))
    about = json.loads(next(Path("second").rglob("answers.json")).read_text())
    measured = about["measured"]
    assert measured["dense"]["cache"] == 1.0
    assert 0.25 < measured["LRSA"]["cache"] < 0.75
    assert about["attentions"]["LRSA"]["rule"]["system"]["init_args"] == {"count": 8, "chunk": 32}
    main(["predict", *evaluated])
    lines = next(Path("second").rglob("predictions.jsonl")).read_text().splitlines()
    answers = next(Path("second").rglob("answers.jsonl")).read_text().splitlines()
    told = [(json.loads(line)["LRSA"]["prediction"], json.loads(line)["LRSA"]["f1"]) for line in answers]
    assert [(json.loads(line)["prediction"], json.loads(line)["f1"]) for line in lines] == told
    names = {run.info.run_name for run in recorded_runs(Path("second/mlflow.db"), "lrsa")}
    assert "tiny-digests-8-of-32-s0" in names


def test_plain_texts_are_repeated_as_well(elsewhere):
    texts = {"class_path": "lrsa_lit.data.TextFiles", "init_args": {"packing": None, "max_tokens": 40, "test": None}}
    files = dict.fromkeys(("train", "val"), "data/sample-texts.jsonl")
    changes = merged(texts, {"init_args": files | {"limit": {"train": 6, "val": 2}, "batch_size": 2}})
    Path("texts.yaml").write_text(yaml.safe_dump({"data": changes}))
    fit("repeat", "texts", *NO_LOGGER, "--config", "texts.yaml")


@pytest.mark.parametrize("stage", ["repeat", "answer"])
def test_a_stopped_fit_goes_on_to_the_same_digests(stage, elsewhere):
    whole = fit(stage, "whole", *NO_LOGGER)
    with before_step(3, ctrl_c), pytest.raises(SystemExit, match="130"):
        fit(stage, "halves", *NO_LOGGER)
    stopped = next(Path("halves").rglob("last.ckpt"))
    assert torch.load(stopped, weights_only=True)["global_step"] == 3
    halves = fit(stage, "halves", *NO_LOGGER, "--ckpt_path", str(stopped))
    one, other = map(weights, (whole, halves))
    assert {name for name, weight in one.items() if not weight.equal(other[name])} == set()
    assert one["digests.reader.layers.0.v.weight"].any()


@pytest.mark.slow
def test_two_devices_train_the_digests_that_one_trains(elsewhere):
    options = [
        *NO_LOGGER,
        "--validate_first",
        "false",
        "--data.init_args.val",
        "null",
        "--trainer.gradient_clip_val",
        "0",
    ]
    one = fit("answer", "one", *options, "--data.init_args.batch_size", "4")
    ddp = ["--config", "configs/trainer/ddp.yaml", "--trainer.devices", "2", "--trainer.default_root_dir", "two"]
    processes.run(["fit", *STAGES["answer"], *ddp, *options], elsewhere)
    one, two = map(weights, (one, next(Path("two").rglob("last.ckpt"))))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=2e-5)


def other_model():
    tiny_model(seed=1).save_pretrained("other")
    Backbone("tiny").tokenizer.save_pretrained("other")


def test_what_does_not_suit_is_refused(capfd, elsewhere):
    first = fit("repeat", "first", *NO_LOGGER, "--validate_first", "false", "--trainer.max_steps", "1")
    repeat, answer = (["fit", *STAGES[stage]] for stage in ("repeat", "answer"))
    told = refusal(capfd, *answer, "--model.lrsa.top_k", "16")
    assert told == "model.lrsa.top_k: 16 is not read by the system ICFormer; leave one of them out"
    told = refusal(capfd, *answer, "--model.lrsa.dense_layers", "[0]")
    assert told == "model.lrsa.dense_layers: is not allowed with digests: the LLM attends to all digests"
    told = refusal(capfd, *answer, "--model.digests.init_args.count", "33")
    assert told.startswith("model.digests.init_args.count: 33 is not allowed; it must be at most chunk, which is 32")
    told = refusal(capfd, *answer, "--model.backbone.lora", "{rank: 2}")
    assert told == "model.backbone.lora: is not allowed with digests: the LLM is frozen"
    told = refusal(capfd, *repeat, "--model.generate_answers", "true")
    assert told.startswith("model.generate_answers: is not allowed with digests: the stage repeat is evaluated")
    told = refusal(capfd, *answer, "--data.init_args.packing", "{tokens: 900}", "--data.init_args.batch_size", "1")
    assert told == "data.init_args.packing: is not allowed with model.digests; it must be null"
    told = refusal(capfd, *answer, "--data.init_args.max_tokens", "40000")
    assert told.startswith("data.init_args.max_tokens: 40000 is not allowed; tiny has 8192 positions")
    told = refusal(capfd, *answer, "--estimate")
    assert told == "model.digests: works only with fit (not --estimate), validate, test and predict"
    told = refusal(capfd, *answer, "--config", "configs/trainer/fsdp.yaml", "--trainer.devices", "1")
    assert told == "trainer.strategy: cannot train model.digests, because it shards the model"
    told = refusal(capfd, "test", *STAGES["answer"], "--budget", "0.2")
    assert told.startswith("budget: 0.2 is not allowed; ICFormer has no size to set")
    told = refusal(capfd, "predict", *STAGES["repeat"], "--ckpt_path", str(first))
    assert told == "model.digests.init_args.stage: 'repeat' is not allowed; it must be answer for predict"
    chats = ["--data", "lrsa_lit.data.ChatFiles", *(f"--data.init_args.{name}=data/sample-chats.jsonl" for name in
                                                     ("train", "val", "test"))]  # fmt: skip
    told = refusal(capfd, *answer, *chats)
    assert told.startswith("data: has examples without a marked context")
    other_model()
    for command in ([*answer, "--model.start_from"], ["test", *STAGES["answer"], "--ckpt_path"]):
        told = refusal(capfd, *command, str(first), "--model.backbone.source", "./other")
        assert "its digests were trained for another base model, 'tiny'; this run uses './other'" in told
    told = refusal(capfd, "ask", "--model", str(first), "tiny.yaml", "Which model?")
    assert "holds digests and no weights of a model" in told
    rows = {"digests": {"model": {"digests": {"class_path": "lrsa_lit.tasks.Digests"}}}}
    study = merged(STUDY, {"rows": rows})
    study["model"] = {name: value for name, value in study["model"].items() if name != "lrsa"}
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    told = refusal(capfd, "study", "run", "study.yaml", "--part", "main")
    assert told.startswith("study.yaml: rows.digests.model.digests: rows train weights")
