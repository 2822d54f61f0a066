"""A study of a tiny model from end to end: what runs, what is skipped, what is taken up again."""

import errno
import itertools
import json
import logging
import os
import signal

import pytest
import torch
import yaml
from cli_helpers import interruptible
from helpers import one_line
from study.conftest import STUDY, without_times

from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report.cells import Cells
from lrsa_lit.study import settings
from lrsa_lit.study.plan import Study
from lrsa_lit.study.results import read_lines
from lrsa_lit.study.runner import Runner
from lrsa_lit.study.training import task_of
from lrsa_lit.tasks import LongContextQA


def runner(study_file, data, tmp_path, *, seconds=1000.0, clock=lambda: 0.0, out="results.jsonl") -> Runner:
    return Runner(Study(str(study_file)), data, tmp_path / out, tmp_path / "work", seconds, clock=clock)


def test_a_part_runs_from_the_command_and_is_skipped_the_second_time(study_file, data, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    arguments = ["--part", "main", "--data", str(data), "--out", str(out)]
    command = ["study", "run", str(study_file), *arguments, "--work", str(tmp_path / "work")]
    main([*command, "--minutes", "0"])
    assert not out.exists()
    assert "not done yet" in capsys.readouterr().out
    main(command)
    assert "main: done" in capsys.readouterr().out
    first = out.read_text()
    lines = [json.loads(text) for text in first.splitlines()]
    kinds = [(line["kind"], line["row"], line.get("attention"), line.get("set")) for line in lines]
    assert kinds == [
        (kind, row, attention, data_set)
        for row in ("dense", "lrsa")
        for kind, attention, data_set in (
            ("training", None, None),
            ("evaluation", "dense", "plain"),
            ("evaluation", "4x", "plain"),
            ("evaluation", "dense", "text"),
            ("evaluation", "4x", "text"),
        )
    ]
    plain, text = lines[2], lines[4]
    assert len(plain["f1"]) == len(plain["loss"]) == len(plain["text"]) == 3
    assert plain["survival"]["chance"] == 0.25
    assert 0.25 < plain["kv_share"] < 1 == lines[1]["kv_share"]
    assert (text["f1"], text["text"], len(text["loss"])) == ([], [], 2)
    main(command)
    assert out.read_text() == first
    main(["study", "status", str(study_file), *arguments])
    assert "lrsa, seed 0" in (shown := capsys.readouterr().out)
    assert "4/4 evaluated" in shown


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_training_stopped_by_the_clock_goes_on_to_the_same_weights(accumulated, study_file, data, tmp_path, capsys):
    asked = settings.merged(STUDY, {"trainer": {"accumulate_grad_batches": accumulated}})
    study_file.write_text(yaml.safe_dump(asked, sort_keys=False))
    whole = runner(study_file, data, tmp_path, out="whole.jsonl")
    assert whole.run("main")
    (tmp_path / "work").rename(tmp_path / "whole")
    # Time passes with each look at the clock: calls end in the middle of a training, and after one evaluation.
    for seconds in (17.5, 19.5) * 10:
        asked = iter(range(10**6))
        cut = runner(study_file, data, tmp_path, seconds=seconds, clock=lambda asked=asked: float(next(asked)))
        if cut.run("main"):
            break
    assert capsys.readouterr().out.count("stopped at step 2 of 3") == 2
    assert without_times(read_lines(tmp_path / "results.jsonl")) == without_times(read_lines(tmp_path / "whole.jsonl"))
    for file in (tmp_path / "whole").rglob("*.pt"):
        one, other = (torch.load(path) for path in (file, tmp_path / "work" / file.relative_to(tmp_path / "whole")))
        assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(
    ("number", "end", "code"), [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)]
)
def test_a_training_that_is_interrupted_keeps_its_steps(
    number, end, code, study_file, data, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    run, looks = runner(study_file, data, tmp_path), itertools.count()

    def clock() -> float:
        # The first look is before the training, the second one after its first step.
        if next(looks) == 1:
            os.kill(os.getpid(), number)
        return 0.0

    monkeypatch.setattr(run, "clock", clock)
    with interruptible(), pytest.raises(end) as stop:
        run.run("main", rows=["lrsa"])
    assert getattr(stop.value, "code", None) == code
    assert "weights_only" not in caplog.text
    (checkpoint,) = (tmp_path / "work").rglob("training.ckpt")
    assert 0 < torch.load(checkpoint)["global_step"] < 3
    assert runner(study_file, data, tmp_path).run("main", rows=["lrsa"])
    assert runner(study_file, data, tmp_path / "whole").run("main", rows=["lrsa"])
    found, expected = (read_lines(folder / "results.jsonl") for folder in (tmp_path, tmp_path / "whole"))
    assert without_times(found) == without_times(expected)


@pytest.mark.parametrize(
    ("number", "end", "code"), [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)]
)
def test_a_training_that_is_interrupted_before_its_first_step_ends_the_study(
    number, end, code, study_file, data, tmp_path, monkeypatch
):
    def interrupted(self):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(LongContextQA, "configure_model", interrupted)
    with interruptible(), pytest.raises(end) as stop:
        runner(study_file, data, tmp_path).run("main", rows=["lrsa"])
    assert getattr(stop.value, "code", None) == code


def test_weights_that_cannot_be_written_do_not_cost_the_training(study_file, data, tmp_path, monkeypatch):
    asked = iter(range(10**6))
    cut = runner(study_file, data, tmp_path, seconds=17.5, clock=lambda: float(next(asked)))
    assert not cut.run("main")
    (checkpoint,) = (tmp_path / "work").rglob("training.ckpt")

    def full(*_):
        # As torch raises it where a disk is full.
        raise RuntimeError("unexpected pos") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError) as error:
        runner(study_file, data, tmp_path).run("main")
    assert ".pt: not saved (No space left on device)" in one_line(error.value)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["training.ckpt"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"optimizer": {"init_args": {"lrr": 0.1}}}}, "rows.late: torch.optim.AdamW: .*'lrr'"),
        (
            {"model": {"optimizer": {"class_path": "torch.optim.Adamw", "init_args": {"lr": 0.1}}}},
            "rows.late: .*'torch.optim.Adamw'",
        ),
        ({"model": {"backbone": {"sorce": "tiny"}}}, "rows.late: model.backbone: .*'sorce'"),
        ({"model": {"backbone": {"lora": {"rnk": 2}}}}, "rows.late: model.backbone.lora: .*'rnk'"),
    ],
    ids=["argument", "class", "backbone", "lora"],
)
def test_a_mistake_in_a_late_row_costs_no_training(changes, named, data, tmp_path):
    main = {"rows": ["dense", "late"]}
    changed = settings.merged(STUDY, {"rows": {"late": changes}, "parts": {"main": main}})
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(changed))
    run = runner(tmp_path / "late.yaml", data, tmp_path)
    with pytest.raises(UserError, match=named):
        run.run("main")
    assert not (tmp_path / "results.jsonl").exists()


def test_an_attention_of_layers_that_there_are_not_costs_no_training(data, tmp_path):
    changed = settings.merged(STUDY, {"inference": {"4x": {"dense_layers": [7]}}})
    (tmp_path / "layers.yaml").write_text(yaml.safe_dump(changed))
    run = runner(tmp_path / "layers.yaml", data, tmp_path)
    with pytest.raises(UserError, match=r"inference\.4x: lrsa\.dense_layers: \[7\]"):
        run.run("main")
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trainer": {"precision": "fp7"}}, r"rows\.lrsa\.trainer: .*fp7"),
        ({"model": {"optimizer": {"init_args": {"lr": "high"}}, "lr_scheduler": None}}, r"model\.optimizer: .*str"),
    ],
    ids=["trainer", "optimizer"],
)
def test_settings_that_a_training_refuses_are_named(changes, named, data, tmp_path):
    changed = settings.merged(STUDY, {"rows": {"lrsa": changes}})
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match=named):
        runner(tmp_path / "changed.yaml", data, tmp_path).run("main", rows=["lrsa"])


@pytest.mark.parametrize(("taken", "option"), [("results", "out"), ("work", "work")])
def test_results_that_cannot_be_written_cost_no_training(taken, option, study_file, data, tmp_path):
    (tmp_path / taken).write_text("a file, where a folder is needed")
    run = runner(study_file, data, tmp_path, out="results/all.jsonl")
    with pytest.raises(UserError, match=rf"--{option}: .* cannot be written"):
        run.run("main")
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_last_result_without_its_end_is_none_that_was_cut_off(study_file, data, tmp_path):
    out = tmp_path / "results.jsonl"
    runner(study_file, data, tmp_path).run("main", rows=["dense"])
    before = out.read_text()
    out.write_text(before.removesuffix("\n"))
    runner(study_file, data, tmp_path).run("main", rows=["lrsa"])
    assert out.read_text().startswith(before)
    assert len(read_lines(out)) == 2 * len(before.splitlines())
    out.write_text(before + before.splitlines()[0][:-40])
    assert len(read_lines(out)) == len(before.splitlines())


def test_a_file_of_something_else_is_not_taken_for_results(study_file, data, tmp_path):
    (tmp_path / "notes.txt").write_text("dear diary")
    with pytest.raises(UserError, match="line 1: it is no result"):
        runner(study_file, data, tmp_path, out="notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "dear diary"


def test_no_speed_is_measured_on_a_shared_device(study_file, data, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    quick = {"rows": ["lrsa"], "seeds": [0], "inference": ["dense"], "sets": ["plain"]}
    study_file.write_text(yaml.safe_dump({**STUDY, "parts": {"quick": quick}}, sort_keys=False))
    arguments = ["--part", "quick", "--data", str(data), "--out", str(out), "--work", str(tmp_path / "work")]
    main(["study", "run", str(study_file), *arguments, "--shared"])
    (training, evaluation) = read_lines(out)
    assert training["tokens_per_second"] is None
    assert "tokens/s" not in capsys.readouterr().out
    assert training["machine"]["shared"] == evaluation["machine"]["shared"] == "yes"


def test_a_part_may_be_run_row_by_row(study_file, data, tmp_path):
    first, second = runner(study_file, data, tmp_path), runner(study_file, data, tmp_path, out="second.jsonl")
    assert first.run("main", rows=["lrsa"])
    assert {line["row"] for line in first.results.lines} == {"lrsa"}
    assert second.run("main", rows=["dense"])
    assert {line["row"] for line in second.results.lines} == {"dense"}
    together = tmp_path / "results.jsonl"
    together.write_text(together.read_text() + (tmp_path / "second.jsonl").read_text())
    assert not any(missing for _, _, missing in runner(study_file, data, tmp_path).todo("main"))
    with pytest.raises(UserError) as error:
        first.run("main", rows=["lrsa", "other"])
    assert "--rows: 'other' is not allowed; main has dense, lrsa" in one_line(error.value)


def test_a_part_may_be_run_seed_by_seed(study_file, data, tmp_path):
    asked = {**STUDY["parts"]["main"], "rows": ["dense"], "seeds": [0, 1]}
    study_file.write_text(yaml.safe_dump({**STUDY, "parts": {"main": asked}}, sort_keys=False))
    one = runner(study_file, data, tmp_path)
    assert one.run("main", seeds=[1])
    assert {line["seed"] for line in one.results.lines} == {1}
    assert [bool(missing) for _, _, missing in one.todo("main")] == [True, False]
    with pytest.raises(UserError) as error:
        one.run("main", seeds=[2])
    assert "--seeds: 2 is not allowed; main has 0, 1" in one_line(error.value)


def test_parts_together_are_done_row_by_row_and_nothing_twice(study_file, data, tmp_path, capsys):
    losses = {
        "rows": ["dense", "lrsa"],
        "seeds": [0],
        "inference": ["dense", "8x"],
        "sets": ["plain"],
        "generate": False,
    }
    study_file.write_text(yaml.safe_dump({**STUDY, "parts": {**STUDY["parts"], "losses": losses}}, sort_keys=False))
    out = tmp_path / "results.jsonl"
    arguments = ["--part", "losses", "main", "--data", str(data), "--out", str(out)]
    main(["study", "run", str(study_file), *arguments, "--work", str(tmp_path / "work")])
    lines = read_lines(out)
    found = [(line["row"], line.get("attention"), line.get("set"), line.get("generated")) for line in lines]
    one = [("dense", "plain", True), ("8x", "plain", False), ("4x", "plain", True), ("dense", "text", False),
           ("4x", "text", False)]  # fmt: skip
    for row in ("dense", "lrsa"):
        # Answers were asked for second, and the losses are theirs.
        mine = found[: len(one) + 1] if row == "dense" else found[len(one) + 1 :]
        assert mine[0] == (row, None, None, None)
        assert sorted(mine[1:]) == sorted((row, *cell) for cell in one)
    capsys.readouterr()
    main(["study", "status", str(study_file), *arguments])
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in shown] == ["trained, 5/5 evaluated"] * 2


def test_lost_weights_are_trained_again_for_what_is_missing(study_file, data, tmp_path):
    assert runner(study_file, data, tmp_path).run("main")
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    for file in (tmp_path / "work").rglob("*.pt"):
        file.unlink()
    assert runner(study_file, data, tmp_path).run("main")
    again = read_lines(tmp_path / "results.jsonl")
    assert without_times(again)[-1] == without_times([json.loads(lines[-1])])[0]


def test_no_result_is_of_other_weights_than_those_beside_it(study_file, data, tmp_path, monkeypatch):
    parts = {"few": {"rows": ["lrsa"], "seeds": [0], "inference": ["own"], "sets": ["plain"]}}
    parts["more"] = {**parts["few"], "inference": ["own", "dense"]}
    study_file.write_text(yaml.safe_dump({**STUDY, "parts": parts}, sort_keys=False))
    assert runner(study_file, data, tmp_path).run("few")
    (weights,) = (tmp_path / "work").rglob("*.pt")
    weights.unlink()
    # As on a GPU, where another training of the same does not give the same bits.
    monkeypatch.setattr("lrsa_lit.study.runner.digest_of_weights", lambda weights: "others")
    assert runner(study_file, data, tmp_path).run("more")
    lines = read_lines(tmp_path / "results.jsonl")
    found = [(line["kind"], line["weights"], line.get("attention")) for line in lines]
    assert found == [("training", weights.stem, None), ("evaluation", weights.stem, "own"),
                     ("training", "others", None), ("evaluation", "others", "own"),
                     ("evaluation", "others", "dense")]  # fmt: skip
    assert Cells(Study(str(study_file)), lines).lines == lines[2:]
    assert [path.name for path in (tmp_path / "work").rglob("*.pt")] == ["others.pt"]


def test_answers_serve_who_asks_for_losses_but_not_the_other_way_round(study_file, data, tmp_path):
    quick = {"rows": ["base"], "inference": ["dense"], "sets": ["plain", "text"], "generate": False}
    parts = {"quick": quick, "full": {**quick, "generate": True}}
    study_file.write_text(yaml.safe_dump({**STUDY, "parts": parts}, sort_keys=False))
    for part, out, expected in (("quick", "a", 2), ("full", "a", 3), ("full", "b", 2), ("quick", "b", 2)):
        assert runner(study_file, data, tmp_path, out=out).run(part)
        lines = read_lines(tmp_path / out)
        assert len(lines) == expected
    losses, text, answers = read_lines(tmp_path / "a")
    assert (losses["text"], losses["survival"], losses["generated"]) == ([], None, False)
    assert (answers["loss"], answers["generated"], text["generated"]) == (losses["loss"], True, False)
    # As lines were before losses could be asked for alone.
    old = [{name: value for name, value in line.items() if name not in ("generated", "weights")} for line in lines]
    (tmp_path / "old").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert read_lines(tmp_path / "old") == lines


def test_other_seeds_other_answers_and_the_base_model_once(study_file, data, tmp_path):
    assert runner(study_file, data, tmp_path).run("all")
    lines = read_lines(tmp_path / "results.jsonl")
    trained = {
        (line["row"], line["seed"]): line["loss_of_last_20_steps"] for line in lines if line["kind"] == "training"
    }
    assert sorted(trained) == [("lrsa", 0), ("lrsa", 1), ("mixed", 0), ("mixed", 1)]
    assert len(set(trained.values())) == 4
    evaluated = [(line["row"], line["seed"]) for line in lines if line["kind"] == "evaluation"]
    assert evaluated.count(("base", 0)) == 2
    assert ("base", 1) not in evaluated


def test_answers_are_those_of_the_task(study_file, data, tmp_path):
    from lrsa_lit.data.collate import collate
    from lrsa_lit.study import tokens
    from lrsa_lit.study.evaluation import evaluate

    study = Study(str(study_file))
    file = tokens.read(tokens.path_of(data, "plain", "test"))
    task = task_of(study.row("lrsa"))
    task.configure_model()
    task.model.eval()
    for rule in study.inference.values():
        found = evaluate(task.model, task.tokenizer, file.examples, rule, max_new_tokens=task.max_new_tokens)
        for number, example in enumerate(file.examples):
            batch = collate([example], task.tokenizer.pad_token_id)
            assert [found.text[number]] == task.generate(batch, rule)[0]
    from lrsa_lit.attention import using

    with torch.no_grad(), using(task.model, study.inference["dense"]):
        loss, count = task.answer_loss(collate(file.examples, task.tokenizer.pad_token_id))
    dense = evaluate(task.model, task.tokenizer, file.examples, None, max_new_tokens=0, batch_size=2)
    assert sum(dense.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(dense.tokens) == count
