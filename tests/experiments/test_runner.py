"""What of a study runs, what is skipped, and what is taken up again."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import warm
from cli_helpers import before_step, refusal
from experiments import tiny_study
from experiments.executors import Fabricated, InProcess
from experiments.tiny_study import STUDY, merged
from helpers import one_line
from mlflow.tracking import MlflowClient

from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import open_study
from lrsa_lit.errors import UserError
from lrsa_lit.experiments import commands, jobs
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.report.cells import Cells
from lrsa_lit.experiments.results import Results, read_lines
from lrsa_lit.experiments.runner import Runner

KL = {"class_path": "lrsa_lit.objectives.Distillation", "init_args": {"teacher": {"row": "dense"}, "positions": 20}}
TAUGHT = {
    "onward": {"model": {"start_from": {"row": "taught"}}},
    "dense": {"model": {"train_attention": None}},
    "taught": {"model": {"objective": KL}},
}
"""Rows that need each other, the last one first."""
NO_LOGGER = {"trainer": {"logger": False}}
FEW = {"rows": ["lrsa"], "seeds": [0], "inference": ["own"], "sets": ["plain"]}


def runner(study_file, data, tmp_path, out="results.jsonl", **options):
    study = open_study(str(study_file))
    results = Results(tmp_path / out, study)
    return Runner(study, Questions(study, data), results, tmp_path / "work", **options)


def fabricated(study_file, data, tmp_path, *parts, out="results.jsonl", rows=(), **options):
    """The lines of some parts whose commands are no real ones, and which commands these were."""
    run = runner(study_file, data, tmp_path, out, overlay=NO_LOGGER)
    executor = Fabricated(run.questions, **options)
    assert run.run(run.chosen(parts, rows), executor) != bool(run.failed)
    return read_lines(tmp_path / out), executor.ran


def cells_of(lines):
    names = ("row", "seed", "attention", "set", "generated")
    return [tuple(map(line.get, names)) for line in lines]


@pytest.mark.slow
def test_a_vocabulary_that_16_bits_cannot_count_a_stop_and_a_report(tmp_path, monkeypatch, capfd):
    source = str(tiny_study.big_model(tmp_path / "model"))
    few = FEW | {"inference": ["dense", "own"]}
    study_file = tiny_study.write(
        tmp_path / "big.yaml", model=STUDY["model"] | {"backbone": {"source": source}}, parts={"few": few}
    )
    main(["study", "data", str(study_file), "--data", "data"])
    with before_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        run = runner(study_file, tmp_path / "data", tmp_path)
        assert not run.run(run.chosen(["few"]), InProcess())
    assert not (tmp_path / "results.jsonl").exists()
    # The same in processes of their own, from the checkpoint on.
    files = ["--data", "data", "--out", "results.jsonl", "--work", "work"]
    with warm.commands() as command, monkeypatch.context() as patch:
        patch.setattr(jobs, "command_line", command)
        main(["study", "run", str(study_file), "--part", "few", *files])
    shown = capfd.readouterr().out
    assert "training resumes" in shown
    assert "few: done" in shown
    training, dense, own = read_lines(tmp_path / "results.jsonl")
    assert len(training["losses"]) == training["steps"] == 3
    assert (dense["attention"], own["attention"], own["questions"]) == ("dense", "own", 3)
    assert own["rule"]["top_k"] == 8
    assert dense["loss"] != own["loss"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (parent,) = (run for run in runs if "study" in run.data.tags)
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs if run is not parent} == {parent.info.run_id}
    assert len(runs) == 3, "the fit goes on in its run"
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["results.jsonl"]
    # Whole, without a stop: the same weights.
    whole = runner(study_file, tmp_path / "data", tmp_path / "whole", overlay=NO_LOGGER)
    assert whole.run(whole.chosen(["few"]), InProcess())
    again = read_lines(tmp_path / "whole" / "results.jsonl")
    for name in ("weights", "losses"):
        assert again[0][name] == training[name]
    assert [line["loss"] for line in again[1:]] == [dense["loss"], own["loss"]]
    store = f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}"
    for source, to in (("results.jsonl", "report"), (store, "stored")):
        main(["study", "report", source, "--study", str(study_file), "--to", to])
    assert (tmp_path / "stored" / "report.md").read_bytes() == (tmp_path / "report" / "report.md").read_bytes()
    assert "## few: plain (test)" in (tmp_path / "report" / "report.md").read_text()


def test_rows_are_done_one_by_one_and_nothing_twice(study_file, data, tmp_path):
    lines, ran = fabricated(study_file, data, tmp_path, "all")
    own = [("own", "plain", True), ("random-4x", "plain", True)]
    assert cells_of(lines) == [
        cell
        for row, seed in (("base", 0), ("mixed", 0), ("lrsa", 0), ("mixed", 1), ("lrsa", 1))
        for cell in [*([(row, seed, None, None, None)] if row != "base" else []), *((row, seed, *each) for each in own)]
    ]
    assert ran == ["test", *["fit", "test"] * 4]
    assert fabricated(study_file, data, tmp_path, "all") == (lines, [])


def test_a_command_evaluates_all_attentions_of_the_same_questions(study_file, data, tmp_path):
    many = {f"k{k}": {"top_k": k} for k in range(9)}
    parts = {"many": FEW | {"inference": ["dense", "k*"]}}
    tiny_study.write(study_file, inference=STUDY["inference"] | many, parts=parts)
    lines, ran = fabricated(study_file, data, tmp_path, "many")
    assert len(lines) == 11
    assert ran == ["fit", "test", "test"]


def test_dense_attention_alone_is_all_that_is_evaluated(study_file, data, tmp_path):
    alone = {"rows": ["base"], "inference": ["dense"], "sets": ["plain"]}
    tiny_study.write(study_file, parts={"alone": alone, "both": alone | {"inference": ["dense", "4x"]}})
    lines, attentions = [], []
    for part in ("alone", "both"):
        run, executor = runner(study_file, data, tmp_path, part, overlay=NO_LOGGER), InProcess()
        assert run.run(run.chosen([part]), executor)
        lines.append(read_lines(tmp_path / part)[0])
        settings = Path(executor.ran[0][-1])
        attentions.append(json.loads(settings.with_name("answers.json").read_text())["attentions"])
    assert [len(found) for found in attentions] == [1, 2]
    one, other = lines
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
    varying = {"loss", "seconds"}
    for line in lines:
        line["measured"] = {key: value for key, value in line["measured"].items() if not key.endswith("seconds")}
    assert {key: one[key] for key in one.keys() - varying} == {key: other[key] for key in other.keys() - varying}


def test_answers_serve_who_asks_for_losses_but_not_the_other_way_round(study_file, data, tmp_path):
    quick = {"rows": ["base"], "inference": ["dense"], "sets": ["plain"], "generate": False}
    tiny_study.write(study_file, parts={"quick": quick, "full": {**quick, "generate": True}})
    for part, out, expected in (("quick", "a", 1), ("full", "a", 2), ("full", "b", 1), ("quick", "b", 1)):
        lines, _ = fabricated(study_file, data, tmp_path, part, out=out)
        assert len(lines) == expected
    losses, answers = read_lines(tmp_path / "a")
    assert (losses["text"], losses["generated"], answers["generated"]) == ([], False, True)
    # As lines were before losses could be asked for alone.
    old = [{name: value for name, value in answers.items() if name not in ("generated", "weights")}]
    (tmp_path / "old").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert read_lines(tmp_path / "old") == [answers]


def test_no_result_is_of_other_weights_than_those_beside_it(study_file, data, tmp_path):
    tiny_study.write(study_file, parts={"few": FEW, "more": FEW | {"inference": ["own", "dense"]}})
    fabricated(study_file, data, tmp_path, "few")
    shutil.rmtree(tmp_path / "work")
    # As on a GPU, where another training of the same does not give the same bits.
    lines, _ = fabricated(study_file, data, tmp_path, "more", weights="others")
    assert [(line["kind"], line["weights"], line.get("attention")) for line in lines] == [
        ("training", "weights", None), ("evaluation", "weights", "own"), ("training", "others", None),
        ("evaluation", "others", "own"), ("evaluation", "others", "dense")]  # fmt: skip
    assert Cells(open_study(str(study_file)), lines).lines == lines[2:]


def test_lost_weights_are_trained_again_for_what_is_missing(study_file, data, tmp_path):
    before, _ = fabricated(study_file, data, tmp_path, "main", rows=["dense"])
    text = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(text[:-1]) + text[-1][:40])
    shutil.rmtree(tmp_path / "work")
    again, ran = fabricated(study_file, data, tmp_path, "main", rows=["dense"])
    assert ran == ["fit", "test"]
    assert again[-1] | {"seconds": 0} == before[-1] | {"seconds": 0}


def test_what_fails_leaves_the_others_alone(study_file, data, tmp_path):
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    executor = Fabricated(run.questions, fails=["fit"])
    assert not run.run(run.chosen(["all"]), executor)
    assert executor.ran == ["test", "fit", "fit", "fit", "fit"]
    assert len(run.failed) == 4
    assert "mixed, seed 0" in run.failed[0]
    assert {line["row"] for line in run.results.lines} == {"base"}


def taught(study_file, *rows, **changes):
    part = FEW | {"rows": rows, "inference": ["own"], **changes}
    return tiny_study.write(study_file, rows=TAUGHT, parts={"taught": part}, bars={})


def test_rows_are_trained_before_those_that_need_them(study_file, data, tmp_path):
    taught(study_file, "onward", "dense", seeds=[0, 1])
    lines, ran = fabricated(study_file, data, tmp_path, "taught")
    assert [(line["kind"], line["row"], line["seed"]) for line in lines] == [
        *[("training", row, seed) for row in ("dense", "taught") for seed in (0, 1)],
        *[(kind, row, seed) for seed in (0, 1) for kind, row in (
            ("training", "onward"), ("evaluation", "onward"), ("evaluation", "dense"))]]  # fmt: skip
    assert ran.count("fit") == 6
    assert fabricated(study_file, data, tmp_path, "taught") == (lines, [])
    # Weights that are gone are needed by nothing that is done.
    shutil.rmtree(tmp_path / "work")
    assert fabricated(study_file, data, tmp_path, "taught") == (lines, [])
    taught(study_file, "taught", "dense")
    again, ran = fabricated(study_file, data, tmp_path, "taught")
    assert ran == ["fit", "fit", "test"]
    assert [line["row"] for line in again[len(lines) - 2 :]][-1] == "taught"


def test_what_needs_a_training_that_fails_is_not_trained(study_file, data, tmp_path):
    taught(study_file, "onward")
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    assert not run.run(run.chosen(["taught"]), Fabricated(run.questions, fails=["fit"]))
    assert [text.partition(":")[0] for text in run.failed] == ["dense, seed 0", "taught, seed 0", "onward, seed 0"]
    assert run.failed[1].endswith("row dense, which it needs, is not trained")


@pytest.mark.slow
def test_a_teacher_and_a_start_that_are_rows(study_file, data, tmp_path, capsys):
    taught(study_file, "onward")

    def run_in(folder):
        run = runner(study_file, data, tmp_path / folder, overlay=NO_LOGGER)
        executor = InProcess()
        return run.run(run.chosen(["taught"]), executor), read_lines(tmp_path / folder / "results.jsonl"), executor.ran

    done, lines, ran = run_in("whole")
    assert done
    assert [(line["kind"], line["row"]) for line in lines] == [
        ("training", "dense"), ("training", "taught"), ("training", "onward"), ("evaluation", "onward")]  # fmt: skip
    objective = json.loads(Path(ran[1][4]).read_text())["model"]["objective"]
    expected = (tmp_path / "whole" / "work").glob(f"{lines[0]['config']}-0-*/checkpoints/last.ckpt")
    assert objective["init_args"]["teacher"] == str(next(expected))
    # Stopped in the middle of the second row.
    capsys.readouterr()
    in_rows = [lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: None]
    with before_step(1, lambda: in_rows.pop()()):
        assert not run_in("stopped")[0]
    done, again, _ = run_in("stopped")
    assert done
    assert "taught, seed 0: training resumes\n" in capsys.readouterr().out
    assert [line["weights"] for line in again] == [line["weights"] for line in lines]


def test_results_of_parts_of_a_study_are_put_together(study_file, data, tmp_path):
    for out, row in (("a.jsonl", "lrsa"), ("b.jsonl", "dense")):
        lines, _ = fabricated(study_file, data, tmp_path, "main", out=out, rows=[row])
        assert {line["row"] for line in lines} == {row}
    (tmp_path / "all.jsonl").write_text((tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text())
    together = runner(study_file, data, tmp_path, "all.jsonl")
    assert not any(missing for _, _, missing in together.todo(together.chosen(["main"])))


def test_no_speed_is_recorded_on_a_shared_device(study_file, data, tmp_path):
    tiny_study.write(study_file, parts={"few": FEW})
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER, shared=True)
    assert run.run(run.chosen(["few"]), Fabricated(run.questions))
    training, evaluation = run.results.lines
    assert training["tokens_per_second"] is None
    assert training["machine"]["shared"] == evaluation["machine"]["shared"] == "yes"
    assert evaluation["measured"] == {"cache": 0.5}


def test_settings_of_a_machine_do_not_make_another_row(study_file, data, tmp_path):
    here = {"model": {"backbone": {"source": str(tiny_study.big_model(tmp_path / "model"))}}}
    run = runner(study_file, data, tmp_path, overlay=merged(NO_LOGGER, here))
    executor = Fabricated(run.questions)
    assert run.run(run.chosen(["main"]), executor)
    assert {line["config"] for line in run.results.lines} <= {row.hash for row in run.study.rows.values()}


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


def test_the_status_of_a_part(study_file, data, tmp_path, capsys):
    fabricated(study_file, data, tmp_path, "main", rows=["lrsa"])
    capsys.readouterr()
    main(["study", "status", str(study_file), "--part", "main", "--data", str(data), "--out", "results.jsonl"])
    dense, lrsa = capsys.readouterr().out.splitlines()
    assert dense.endswith("not trained, 0/4 evaluated")
    assert lrsa.endswith("trained, 4/4 evaluated")


def test_a_last_result_without_its_end_is_none_that_was_cut_off(study_file, data, tmp_path):
    out = tmp_path / "results.jsonl"
    fabricated(study_file, data, tmp_path, "main", rows=["dense"])
    before = out.read_text()
    out.write_text(before.removesuffix("\n"))
    lines, _ = fabricated(study_file, data, tmp_path, "main", rows=["lrsa"])
    assert out.read_text().startswith(before)
    assert len(lines) == 2 * len(before.splitlines())
    out.write_text(before + before.splitlines()[0][:-40])
    assert len(read_lines(out)) == len(before.splitlines())


LONG = {"class_path": "lrsa_lit.data.QAFiles", "init_args": {"max_tokens": 8190, "test": "none.jsonl"}}


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


def test_a_data_set_may_have_longer_answers(study_file, data, tmp_path):
    long = STUDY["data_sets"]["plain"] | {"max_new_tokens": 9}
    tiny_study.write(study_file, data_sets=STUDY["data_sets"] | {"plain": long})
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    (work,) = run.chosen(["main"], rows=["lrsa"])
    for item, wanted in zip(work.evaluations[::2], (9, 4), strict=True):
        files = commands.evaluation(run.study, work.row, [item], tmp_path / item.data_set, NO_LOGGER, depth=2)[2::2]
        given = [json.loads(Path(path).read_text()) for path in files if path.endswith(".yaml")]
        found = [layer["model"]["max_new_tokens"] for layer in given if "max_new_tokens" in layer.get("model", {})]
        assert found[-1] == wanted


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


def test_answers_of_another_length_are_asked_for_again(study_file, data, tmp_path):
    run = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    works = run.chosen(["main"], rows=["lrsa"])
    assert run.run(works, Fabricated(run.questions))
    assert not [item for _, _, missing in run.todo(works) for item in missing]
    long = STUDY["data_sets"]["plain"] | {"max_new_tokens": 9}
    tiny_study.write(study_file, data_sets=STUDY["data_sets"] | {"plain": long})
    again = runner(study_file, data, tmp_path, overlay=NO_LOGGER)
    missing = [item for _, _, missing in again.todo(again.chosen(["main"], rows=["lrsa"])) for item in missing]
    assert {item.data_set for item in missing} == {"plain"}
