"""``lrsa eval``: the command around lm-evaluation-harness."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import recorded_runs, refusal

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from lrsa_lit.cli.main import main
from lrsa_lit.harness import run
from lrsa_lit.models import Backbone
from lrsa_lit.models.checkpoint import describe

EVAL = ["eval", "tiny", "--tasks", "local_choice", "--include-path", "tasks", "--limit", "3"]
RULE = {"sink_size": 2, "lag_size": 16, "top_k": 4}


@pytest.fixture(autouse=True)
def _tasks(tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parents[1] / "harness/tasks", tmp_path / "tasks")
    # It takes seconds to list what is installed, and to look through thousands of tasks.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(run, "TaskManager", lambda include_defaults=True, **given: own_tasks(**given))


def own_tasks(**given):
    return TaskManager(include_defaults=False, **given)


def samples(out, task="local_choice"):
    lines = (Path(out) / f"samples_{task}.jsonl").read_text().splitlines()
    return [[float(answer[0]) for answer in json.loads(line)["filtered_resps"]] for line in lines]


def test_a_checkpoint_is_evaluated_under_its_rule_and_recorded(tmp_path, capfd):
    backbone = Backbone("tiny")
    checkpoint = {"state_dict": {f"model.{name}": weight for name, weight in backbone.build().state_dict().items()}}
    describe(checkpoint, backbone, RULE)
    torch.save({"pytorch-lightning_version": "2.6.6", "lrsa_run": None, **checkpoint}, "x.ckpt")
    main(["eval", "x.ckpt", "--tasks", "local_choice,tasks/local_text.yaml", *EVAL[4:], "--out", "own"])
    out = capfd.readouterr().out
    assert "local_choice" in out
    assert "word_perplexity" in out
    (run,) = recorded_runs(tmp_path / "runs/mlflow.db", "lrsa")
    assert {"eval/local_choice/acc", "eval/local_text/word_perplexity"} <= run.data.metrics.keys()
    assert run.data.tags["rule"] == "L16-K4"
    assert run.data.tags["checkpoint"] == "x.ckpt"
    assert run.data.params["model.lrsa.top_k"] == "4"
    assert run.info.status == "FINISHED"
    kept = {path.name for path in Path("own").iterdir()}
    assert kept == {"results.json", "table.md", "samples_local_choice.jsonl", "samples_local_text.jsonl"}
    artifacts = {path.name for path in (tmp_path / "runs/artifacts").rglob("*") if path.is_file()}
    assert kept <= artifacts
    results = json.loads(Path("own/results.json").read_text())
    assert results["config"]["lrsa"]["rule"]["top_k"] == 4
    assert results["results"]["local_choice"]["acc,none"] == run.data.metrics["eval/local_choice/acc"]


def test_options_choose_the_attention(capfd):
    """Each is the same as its other form, and none is the same as another."""
    asked = {
        "dense": ["--dense"],
        "keeps all": ["--lag-size", "16", "--top-k", "16"],
        "rule": ["--lag-size", "16", "--top-k", "4", "--sink-size", "2"],
        "settings": ["--rule", json.dumps({**RULE, "lag_size": 8}), "--lag-size", "16"],
        "system": ["--rule", "{system: {class_path: StreamingLLM, init_args: {kept: 0.3, question: true}}}"],
    }
    found = {}
    for name, options in asked.items():
        main([*EVAL, "--no-mlflow", "--out", name, *options])
        found[name] = torch.tensor(samples(name))
    torch.testing.assert_close(found["keeps all"], found["dense"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found["settings"], found["rule"])
    for name in ("rule", "system"):
        assert (found[name] - found["dense"]).abs().max() > 1e-2
    assert (found["rule"] - found["system"]).abs().max() > 1e-2
    assert not Path("runs").exists()


def test_chat_template_and_generation(capfd):
    options = ["--apply-chat-template", "--system-instruction", "Be short.", "--gen-kwargs", "max_gen_toks=3"]
    main(["eval", "tiny", "--tasks", "local_answer", *EVAL[4:], "--no-mlflow", "--out", "out", *options])
    (line, *_) = map(json.loads, Path("out/samples_local_answer.jsonl").read_text().splitlines())
    assert line["arguments"][0][0].startswith("<|im_start|>system\nBe short.<|im_end|>")
    assert 0 < len(line["resps"][0][0]) <= 3


def test_a_group_and_a_store_that_does_not_answer(capfd):
    main(["eval", "tiny", "--tasks", "local_group", *EVAL[4:], "--no-mlflow"])
    out = capfd.readouterr().out
    assert "local_choice" in out
    assert "local_answer" in out
    options = ["--out", "out", "--store", "http://127.0.0.1:9/"]
    assert "--store: http://127.0.0.1:9/ does not answer" in refusal(capfd, *EVAL, *options)
    assert not Path("out").exists()


MISTAKES = {
    "a task twice": (["--tasks", "local_group,local_choice"], "cannot be evaluated together"),
    "generation behind a prompt that is read twice": (
        ["--tasks", "local_answer", "--rule", "{system: {class_path: KVzip, init_args: {question: true}}}"],
        "KVzip reads prompts twice",
    ),
    "no task": (["--tasks", ","], "--tasks"),
    "unknown task": (["--tasks", "local_choise"], "local_choise"),
    "missing file": (["--tasks", "tasks/none.yaml"], "none.yaml"),
    "missing folder": (["--include-path", "none"], "--include-path"),
    "dense with a rule": (["--dense", "--top-k", "3"], "--top-k"),
    "dense with settings": (["--dense", "--rule", "{}"], "--rule"),
    "rule that is none": (["--rule", "top_k"], "--rule"),
    "unknown setting": (["--rule", "{topk: 3}"], "--rule: topk"),
    "unknown system": (["--rule", "{system: None}"], "--rule: system"),
    "K beyond L": (["--top-k", "17", "--lag-size", "16"], "--top-k"),
    "arguments of generation": (["--gen-kwargs", "temperatur=1"], "the nearest are temperature"),
    "an argument without a value": (["--gen-kwargs", "top_p"], "NAME=VALUE"),
    "batch size": (["--batch-size", "0"], "--batch-size"),
    "limit": (["--limit", "1.5"], "--limit"),
    "store": (["--store", "ftp://x"], "--store"),
    "model": (["--rope-scaling", "yarn:0"], "--rope-scaling"),
    "unseen question": (["--rule", "{system: {class_path: SnapKV}}"], "question: true"),
    "no prompt": (["--tasks", "local_text", "--rule", "{system: {class_path: SnapKV, init_args: {question: true}}}"],
                  "SnapKV answers after a prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(case, capfd, tmp_path):
    options, named = MISTAKES[case]
    assert named in refusal(capfd, *EVAL, "--out", "out", *options)
    assert not Path("out").exists()
    assert not Path("runs").exists()


def test_a_task_that_cannot_be_loaded_is_named_before_the_model_is(capfd, monkeypatch):
    Path("tasks/questions.jsonl").unlink()
    monkeypatch.setattr(Backbone, "build", None)
    assert "'local_choice' cannot be loaded" in refusal(capfd, *EVAL, "--no-mlflow")


def test_results_replace_nothing(capfd):
    Path("out").mkdir()
    Path("out/mine").write_text("x")
    assert "--out" in refusal(capfd, *EVAL, "--out", "out")
    assert Path("out/mine").read_text() == "x"


def test_without_the_harness_its_extra_is_named(capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lrsa-lit[eval]'" in refusal(capfd, *EVAL)


def test_mistakes_are_told_before_anything_is_imported(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--include-path" in refusal(capfd, *EVAL, "--include-path", "none")
