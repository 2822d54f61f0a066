"""What is refused before anything of a study runs."""

import json

import pytest
from cli_helpers import refusal
from experiments import tiny_study
from experiments.executors import Fabricated
from experiments.runs import FEW, KL, NO_LOGGER, runner
from experiments.tiny_study import STUDY, merged
from helpers import one_line

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.results import read_lines

LONG = {"class_path": "lrsa_lit.data.QAFiles", "init_args": {"max_tokens": 8190, "test": "none.jsonl"}}


def test_examples_that_have_changed_are_told(study_file, data, tmp_path):
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    index = data / "tiny-study.json"
    content = json.loads(index.read_text())
    content["plain/test"]["facts"]["digest"] = "0" * 12
    index.write_text(json.dumps(content))
    stale = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    with pytest.raises(UserError) as error:
        stale.run(stale.chosen(["all"]), Fabricated(run.questions))
    assert error.value.field == "--data"


@pytest.mark.parametrize(("option", "value"), [("rows", "other"), ("seeds", 9)])
def test_a_row_or_seed_that_a_part_does_not_have(option, value, study_file, data, tmp_path):
    run = runner(study_file, data, tmp_path)
    with pytest.raises(UserError) as error:
        run.chosen(["main"], **{option: [value]})
    assert error.value.field == f"--{option}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--part", "none"], "--part"),
        (["--part", "main", "--rows", "none"], "--rows"),
        (["--part", "main", "--minutes", "-1"], "--minutes"),
        (["--part", "main", "--workers", "0"], "--workers"),
        (["--part", "main", "--on", "ray://127.0.0.1:9"], "--on"),
        (["--part", "main", "--jobs", "0"], "--jobs"),
        (["--part", "main", "--jobs", "2", "--on", "ray"], "--jobs"),
        (["--part", "main", "--out", "notes.txt"], "notes.txt"),
        (["--part", "main", "--out", "others.jsonl"], "others.jsonl"),
        (["--part", "main", "--out", "taken/results.jsonl"], "--out"),
        (["--part", "main", "--work", "taken"], "--work"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, named, study_file, data, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("dear diary")
    (tmp_path / "taken").write_text("a file, where a folder is needed")
    line = {**read_lines(tiny_study.RESULTS)[0], "study": "another", "config": "0" * 12}
    (tmp_path / "others.jsonl").write_text(json.dumps(line) + "\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    error = refusal(capfd, "study", "run", str(study_file), "--data", str(data), *arguments)
    assert named in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_sets": STUDY["data_sets"] | {"long": LONG}, "parts": {"far": FEW | {"sets": ["long"]}}},
         "data_sets.long.init_args.max_tokens: 8190 is not allowed; it must be at most 8188"),
        ({"data_sets": STUDY["data_sets"] | {"long": merged(LONG, {"init_args": {"max_tokens": 8161}})},
          "model": {name: value for name, value in STUDY["model"].items() if name != "max_new_tokens"},
          "parts": {"far": FEW | {"sets": ["long"]}}},
         "data_sets.long.init_args.max_tokens: 8161 is not allowed; it must be at most 8160"),
        ({"rows": STUDY["rows"] | {"long": {"data": {"init_args": {"max_tokens": 8189}}}},
          "parts": {"far": FEW | {"rows": ["long"]}}}, "rows.long.data.init_args.max_tokens: 8189"),
        # Two sinks, 8 of each of 30 partitions and a window of 62: 304 of 1,024 tokens.
        ({"bars": {"b": {"set": "plain", "row": "lrsa", "inference": "own", "of": ["dense", "dense"], "at_least": 0.9,
                         "cache": 0.25}}}, "bars.b.cache: 0.25 is not allowed; it must be at least 0.297, which"),
        ({"bars": {"b": {"set": "plain", "row": "dense", "inference": "own", "of": ["lrsa", "dense"], "at_least": 0.9,
                         "cache": 0.5}}}, "bars.b.cache: 0.5 is not allowed; it must be at least 1.0"),
    ],
    ids=["a task longer than the model", "with the answers of the default",
         "training longer than the model", "a budget", "a budget of dense attention"],
)  # fmt: skip
def test_a_mistake_anywhere_in_a_study_costs_no_training(changes, field, study_file, data, tmp_path):
    parts = STUDY["parts"] | changes.get("parts", {})
    tiny_study.write(study_file, **{"bars": {}} | changes | {"parts": parts})
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    executor = Fabricated(run.questions)
    with pytest.raises(UserError) as error:
        run.run(run.chosen(["main"]), executor)
    assert one_line(error.value).startswith(field)
    assert not executor.ran


@pytest.mark.parametrize(
    ("row", "inference", "field"),
    [
        ({"data": {"init_args": {"batch_size": 0}}}, {}, "rows.late.data"),
        ({"data": {"init_args": {"weights": {"plain": -1}}}}, {}, "rows.late.data"),
        ({"model": {"objective": merged(KL, {"init_args": {"weight": -1.0}})}}, {}, "rows.late.model.objective"),
        ({"model": {"objective": merged(KL, {"init_args": {"positions": 1024}})}}, {}, "rows.late.model.objective"),
        ({}, {"4x": {"dense_layers": [7]}}, "inference.4x"),
    ],
    ids=["batch", "share", "objective", "positions", "layers"],
)
def test_a_mistake_in_a_late_row_costs_no_training(row, inference, field, study_file, data, tmp_path):
    parts = {"main": STUDY["parts"]["main"] | {"rows": ["dense", "late"]}}
    tiny_study.write(
        study_file, rows=STUDY["rows"] | {"late": row}, parts=parts, inference=STUDY["inference"] | inference, bars={}
    )
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    executor = Fabricated(run.questions)
    with pytest.raises(UserError) as error:
        run.run(run.chosen(["main"]), executor)
    assert error.value.field.startswith(field)
    assert not executor.ran
