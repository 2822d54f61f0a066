"""What of a study runs, what is skipped, and what is taken up again."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import warm
from cli_helpers import before_step
from experiments import tiny_study
from experiments.executors import Fabricated, InProcess
from experiments.runs import FEW, KL, NO_LOGGER, fabricated, runner
from experiments.tiny_study import STUDY, merged
from mlflow.tracking import MlflowClient

from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments import commands, jobs, on_ray
from lrsa_lit.experiments.report.cells import Cells
from lrsa_lit.experiments.results import read_lines

TAUGHT = {
    "onward": {"model": {"start_from": {"row": "taught"}}},
    "dense": {"model": {"train_attention": None}},
    "taught": {"model": {"objective": KL}},
}
"""Rows that need each other, the last one first."""


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
    # In the order of the patterns, each of them once.
    parts = {"many": FEW | {"inference": ["k8", "dense", "k*"]}}
    tiny_study.write(study_file, inference=STUDY["inference"] | many, parts=parts)
    lines, ran = fabricated(study_file, data, tmp_path, "many")
    assert [line.get("attention") for line in lines] == [None, "k8", "dense", *(f"k{k}" for k in range(8))]
    assert ran == ["fit", "test", "test", "test"]


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


@pytest.mark.parametrize("shares", [["--shared"], ["--jobs", "2"]], ids=" ".join)
def test_no_speed_is_recorded_on_a_shared_device(shares, study_file, data, tmp_path, monkeypatch):
    tiny_study.write(study_file, parts={"few": FEW})
    questions = runner(study_file, data, tmp_path).questions
    monkeypatch.setattr(on_ray, "Executor", lambda *_: Fabricated(questions))
    out = tmp_path / "results.jsonl"
    files = ["--data", str(data), "--out", str(out), "--work", str(tmp_path / "work"), "--no-mlflow"]
    main(["study", "run", str(study_file), "--part", "few", *files, *shares])
    training, evaluation = read_lines(out)
    assert training["tokens_per_second"] is None
    assert training["machine"]["shared"] == evaluation["machine"]["shared"] == "yes"
    assert evaluation["measured"] == {"cache": 0.5}


def test_settings_of_a_machine_do_not_make_another_row(study_file, data, tmp_path):
    here = {"model": {"backbone": {"source": str(tiny_study.big_model(tmp_path / "model"))}}}
    run = runner(study_file, data, tmp_path, overlay=merged(NO_LOGGER, here))
    executor = Fabricated(run.questions)
    assert run.run(run.chosen(["main"]), executor)
    assert {line["config"] for line in run.results.lines} <= {row.hash for row in run.study.rows.values()}


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
