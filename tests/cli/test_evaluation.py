"""`lrsa test` and `lrsa validate` on the shipped evaluation sets, with the tiny model."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
from cli_helpers import DEBUG, NO_LOGGER, recorded_runs, refusal
from helpers import refused
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.callbacks.line_file import LineFile
from lrsa_lit.cli.main import main
from lrsa_lit.data.ruler import RULER_TASKS
from lrsa_lit.tasks.measures import MEASURES

TINY = ["--config", "configs/model/tiny.yaml", *NO_LOGGER]
RULER = [*TINY, "--config", "configs/data/ruler.yaml", "--data.init_args.max_tokens", "2560"]
SHORT = ["--model.max_new_tokens", "4"]


def answers(folder):
    """Of the latest evaluation."""
    latest = max((folder / "runs").glob("*/answers.jsonl"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    return [json.loads(line) for line in latest.read_text().splitlines()]


def rows(shown):
    """The cells of a table's lines."""
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines() if "│" in line]


def test_ruler_gives_each_task_a_line(tmp_path, capfd):
    main(["test", *RULER, *SHORT, "--data.init_args.test", "18", "--data.init_args.eval_batch_size", "4"])
    shown = capfd.readouterr().out
    assert "Test on 18 questions" in shown
    assert "test/f1" not in shown
    found = answers(tmp_path)
    table = rows(shown)
    assert [row[:3] for row in table[:9]] == [[task, "2", "recall"] for task in RULER_TASKS]
    assert [row[:3] for row in table[9:]] == [
        *(["all", "18", score] for score in ("answer loss", "F1", "exact match", "recall")),
        *(["all", "", MEASURES[name]] for name in MEASURES if name != "read"),
    ]
    took = {label: values for _, _, label, *values in table[-6:]}
    assert took[MEASURES["cache"]][1] == took[MEASURES["pairs"]][1] == "1.000"
    assert 0 < float(took[MEASURES["cache"]][0]) < float(took[MEASURES["pairs"]][0]) < 1
    for task, _, _, *values in table[:9]:
        lines = [line for line in found if line["task"] == task]
        means = [sum(line[name]["recall"] for line in lines) / len(lines) for name in ("LRSA", "dense")]
        assert values == [f"{mean:.3f}" for mean in means]
    assert re.search(r"Longer than max_new_tokens \(4\), so never generated in full: 1\d of 18 reference", shown)
    assert not list((tmp_path / "runs").rglob("*.partial"))


def test_rows_of_unequal_length_in_a_batch_get_what_they_get_alone(tmp_path):
    lines = []
    for size in ("1", "3"):
        main(
            [
                "test",
                *RULER,
                *SHORT,
                "--data.init_args.tasks=[niah_single,frequent_words,qa_squad]",
                *("--data.init_args.test", "6", "--data.init_args.max_tokens", "1024"),
                *("--data.init_args.eval_batch_size", size),
            ]
        )
        lines.append(answers(tmp_path))
    losses = [[line[name].pop("loss") for line in found for name in ("LRSA", "dense")] for found in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert lines[0] == lines[1]
    assert len({line["LRSA"]["prediction"] for line in lines[0]}) > 1


def test_what_was_evaluated_is_said_beside_the_answers(tmp_path):
    main(["test", *TINY, *SHORT, "--config", "configs/data/longbench.yaml"])
    about = json.loads(next((tmp_path / "runs").rglob("answers.json")).read_text())
    found = answers(tmp_path)
    expected = {"command": "test", "split": "test", "checkpoint": None, "model": "tiny", "layers": 2,
                "dtype": "float32", "generated": True, "max_new_tokens": 4}  # fmt: skip
    assert about | expected == about
    assert about["attentions"]["dense"] == {"rule": None, "rule_digest": "dense"}
    rule = LRSAConfig.from_dict(about["attentions"]["LRSA"]["rule"])
    assert about["attentions"]["LRSA"]["rule_digest"] == rule.digest()
    (data,) = about["data_sets"].values()
    assert data["questions"] == len(data["contexts"]) == len(found) == 4
    assert data["kv_share"]["dense"] == 1 > data["kv_share"]["LRSA"] > 0
    assert len(data["set_digest"]) == 12
    for line in found:
        assert 1 <= line["answer_tokens"] < line["prompt_tokens"] <= data["length"] * 4
        assert all(line[name]["loss"] > 0 for name in ("LRSA", "dense"))


def test_losses_alone_for_each_layer(tmp_path, capfd):
    settings = "{dense: null, only: {top_k: 4, dense_layers: {only: 2}}, but: {dense_layers: {all_but: 2}}}"
    options = ["--model.generate_answers", "false", "--model.evaluate", settings]
    main(["test", *TINY, "--config", "configs/data/longbench.yaml", *options])
    shown = capfd.readouterr().out
    assert "F1" not in shown
    assert "never generated in full" not in shown
    names = ["LRSA", "dense", "only-0", "only-1", "but-0", "but-1"]
    # A line each, since they are many.
    assert [row[0] for row in rows(shown)] == names
    assert {len(row) for row in rows(shown)} == {2}
    (path,) = (tmp_path / "runs").rglob("answers.json")
    about = json.loads(path.read_text())
    assert list(about["attentions"]) == names
    assert [about["attentions"][name]["rule"]["dense_layers"] for name in names[2:]] == [[0], [1], [1], [0]]
    for line in answers(tmp_path):
        assert all(set(line[name]) == {"loss"} for name in names)
        assert line["but-0"]["loss"] != line["only-1"]["loss"] != line["dense"]["loss"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{x: {dense_layers: {only: 0}}}", "model.evaluate.x.dense_layers.only: 0"),
        ("{x: {dense_layers: {only: 2, beside: [0, 1]}}}", "model.evaluate.x.dense_layers.beside: [0, 1]"),
        ("{x: {dense_layers: {each: 2}}}", "model.evaluate.x.dense_layers: {'each': 2}"),
        ("{x: {dense_layers: {only: 3}}}", "model.evaluate.x-2.dense_layers: [2]"),
        ("{x-0: {}, x: {dense_layers: {only: 2}}}", "model.evaluate: 'x-0'"),
    ],
)
def test_layers_that_are_not_there_are_refused_before_anything_is_run(settings, said, tmp_path, capfd):
    error = refusal(capfd, "test", *TINY, "--config", "configs/data/longbench.yaml", "--model.evaluate", settings)
    assert said in error
    assert not (tmp_path / "runs").exists()


def test_a_fit_that_watches_a_score_needs_answers(tmp_path, capfd):
    assert "cannot monitor 'val/f1'" in refusal(capfd, "fit", *DEBUG, *NO_LOGGER, "--model.generate_answers", "false")


def longbench(folder):
    row = {"input": "Q?", "answers": ["a"], "dataset": "short", "language": "en"}
    contexts = {"short": "x", "long": "x" * 900, "longer": "x" * 950}
    path = folder / "mine.jsonl"
    made = [{**row, "_id": name, "dataset": name[:4], "context": text} for name, text in contexts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return ["--config", "configs/data/longbench.yaml", "--data.init_args.test", str(path)]


@pytest.mark.parametrize(
    ("truncate", "questions", "note"),
    [
        ("null", 1, "Left out, as they exceed max_tokens (500): 2 questions (2 of long)"),
        (
            "middle",
            3,
            "Cut in the middle of the context, as they exceed max_tokens (500): 2 of 3 questions",
        ),
    ],
)
def test_what_is_too_long_for_longbench_is_said(tmp_path, capfd, truncate, questions, note):
    options = ["--data.init_args.max_tokens", "500", "--data.init_args.truncate", truncate]
    # The report is kept with the tokens: a second run says the same.
    for _ in range(2):
        main(["test", *TINY, *longbench(tmp_path), *options])
        shown = capfd.readouterr().out
        assert f"Test on {questions} question" in shown
        assert note in shown
        assert len(answers(tmp_path)) == questions
        parts = [row[:3] for row in rows(shown) if row[0] != "all"]
        assert parts == ([["shor", "1", "F1"], ["long", "2", "F1"]] if questions == 3 else [])


def test_the_samples_of_both_kinds_work_as_shipped_and_lists_of_metrics_on_request(tmp_path, capfd):
    main(["test", *TINY, "--config", "configs/data/longbench.yaml", "--verbose", "true"])
    shown = capfd.readouterr().out
    assert "Test on 4 questions" in shown
    assert "test/dense/ferry/f1" in shown
    assert {line["task"] for line in answers(tmp_path)} == {"hotpotqa", "ferry"}


def test_the_data_sets_of_a_mixture_have_lines_with_their_own_scores(tmp_path, capfd):
    (tmp_path / "mix.yaml").write_text(
        """
data:
  class_path: lrsa_lit.data.Mixture
  init_args:
    max_tokens: 2000
    weights: {own: 1, needle: 0}
    data_sets:
      own:
        class_path: lrsa_lit.data.QAFiles
        init_args: {max_tokens: 2000, train: data/sample.jsonl, val: data/sample.jsonl}
      needle:
        class_path: lrsa_lit.data.Needles
        init_args: {max_tokens: 2000, tasks: [niah_single, niah_multikey], val: 4}
"""
    )
    main(["validate", *TINY, *SHORT, "--config", "mix.yaml"])
    shown = capfd.readouterr().out
    assert "Validation on 12 questions" in shown
    assert [row[:3] for row in rows(shown)[:4]] == [
        ["own", "8", "F1"],
        ["needle", "4", "recall"],
        ["needle/niah_single", "2", "recall"],
        ["needle/niah_multikey", "2", "recall"],
    ]
    assert {line["data_set"] for line in answers(tmp_path)} == {"own", "needle"}


def test_a_broken_line_ends_in_one_that_names_it(tmp_path, capfd):
    options = longbench(tmp_path)
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write('{"input": "Q?", "context": "x", "answers": ["a"], "language": "zh"}\n')
    line = refusal(capfd, "test", *TINY, *options)
    assert f"{tmp_path}/mine.jsonl, line 4: language: 'zh' is not allowed" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["gold", "LRSA"])
def test_an_attention_does_not_take_the_place_of_something_else_in_the_answers(name, tmp_path, capfd):
    error = refusal(capfd, "test", *TINY, *longbench(tmp_path), "--model.evaluate", f"{{{name}: null}}")
    assert f"model.evaluate: '{name}' is not allowed" in error
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache/data").exists()


def test_an_attention_and_a_task_need_different_names(tmp_path, capfd):
    error = refusal(
        capfd, "test", *TINY, "--config", "configs/data/longbench.yaml", "--model.evaluate", "{ferry: null}"
    )
    assert "model.evaluate: 'ferry' is not allowed" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("taken", "why"),
    [("own.jsonl", "exists"), ("own.jsonl.partial", "exists"), ("own.jsonl/x", "is a folder; it must be a file")],
)
def test_a_path_that_is_taken_is_refused_before_anything_is_generated(taken, why, tmp_path, capfd):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("answers of last week")
    writer = "[{class_path: lrsa_lit.callbacks.AnswerWriter, init_args: {path: own.jsonl}}]"
    error = refusal(capfd, "test", *TINY, *longbench(tmp_path), "--trainer.callbacks", writer)
    assert f"AnswerWriter.path: {taken.removesuffix('/x')} {why}" in error
    assert (tmp_path / taken).read_text() == "answers of last week"
    assert not (tmp_path / "runs").exists()


def test_each_evaluation_keeps_its_answers(tmp_path, capfd):
    options = [*TINY, *SHORT, *longbench(tmp_path), "--data.init_args.max_tokens", "500"]
    for command in ("test", "predict", "test"):
        main([command, *options])
        assert capfd.readouterr().out.splitlines()[-1].startswith("Answers: runs/")
    found = sorted(str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*.jsonl"))
    assert found == ["predict-1/predictions.jsonl", "test-1/answers.jsonl", "test-2/answers.jsonl"]


def test_an_evaluation_is_a_run_with_its_answers(tmp_path, capfd):
    main(["fit", *DEBUG, "--validate_first", "false"])
    (fit,) = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    checkpoint = str(next((tmp_path / "runs").rglob("last.ckpt")))
    main(["test", *DEBUG, "--ckpt_path", checkpoint])
    shown = capfd.readouterr().out.splitlines()
    run, *_ = recorded_runs(tmp_path / "runs/mlflow.db", "debug")
    assert run.info.run_name == "test-tiny-L32-K8-s0@last"
    found = {name: run.data.tags[name] for name in ("command", "checkpoint", "checkpoint.run")}
    assert found == {"command": "test", "checkpoint": checkpoint, "checkpoint.run": fit.info.run_id}
    assert fit.data.tags["command"] == "fit"
    path = tmp_path / "runs" / run.info.experiment_id / run.info.run_id / "answers.jsonl"
    assert len(path.read_text().splitlines()) == 2
    assert next((tmp_path / "runs/artifacts").rglob("answers.jsonl")).read_text() == path.read_text()
    answered, recorded, compared = shown[-3:]
    assert answered == f"Answers: {path.relative_to(tmp_path)}"
    assert run.info.run_id in recorded
    assert compared.endswith(f"lrsa ui --store sqlite:///{tmp_path}/runs/mlflow.db --experiment debug")

    # Again into the same run, as a validation: nothing of the test is lost.
    main(["validate", *DEBUG, "--ckpt_path", checkpoint, "--trainer.logger.run_id", run.info.run_id])
    assert {file.name for file in path.parent.glob("*.jsonl")} == {"answers.jsonl", "answers-2.jsonl"}
    assert len(recorded_runs(tmp_path / "runs/mlflow.db", "debug")) == 2


class Alone:
    """A trainer of one process."""

    world_size, num_nodes, global_rank, is_global_zero, loggers, callbacks = 1, 1, 0, True, (), ()
    state = TrainerState(fn=TrainerFn.TESTING)

    def __init__(self, root):
        self.default_root_dir, self.strategy = root, self

    def broadcast(self, value):
        return value


def test_a_full_disk_keeps_the_answers_before(tmp_path):
    lines = LineFile("k", None, "answers.jsonl")
    lines.begin(Alone(tmp_path))
    lines.write([{"id": 1}, {"id": "\udc80"}], [0, 1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        with refused("k", reason="the 2 answers before") as caught:
            lines.write([{"id": "x" * 100}], [2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = Path(str(caught.value).rpartition(" in ")[2])
    assert [json.loads(line)["id"] for line in kept.read_text().splitlines()] == [1, "\udc80"]
    lines.stop()
    assert kept.exists()


def test_an_evaluation_without_an_answer_leaves_no_file(tmp_path):
    (tmp_path / "own").mkdir()
    for path in (None, str(tmp_path / "own/answers.jsonl")):
        lines = LineFile("k", path, "answers.jsonl")
        lines.begin(Alone(tmp_path))
        lines.stop()
        assert [left.name for left in tmp_path.rglob("*")] == ["own"]
