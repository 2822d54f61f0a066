"""Which checkpoint a command takes, what it says of one that it cannot take, and a disk that is full."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER, before_step, recorded_runs, refusal
from helpers import refused
from mlflow.tracking import MlflowClient

from lrsa_lit.checkpoints import checkpoint_io, resume
from lrsa_lit.checkpoints.resume import differences, settings_of
from lrsa_lit.cli.main import main

FIT = ["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--trainer.limit_val_batches", "1"]
LAST = ["--ckpt_path", "last"]
CHECKPOINTS = "runs/checkpoints"


@pytest.fixture
def fitted(elsewhere):
    """A finished fit of two checkpoints: that of its best validation, and the last."""
    main([*FIT, "--trainer.val_check_interval", "3"])
    return elsewhere / CHECKPOINTS


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def best(folder):
    return next(folder.glob("step*.ckpt"))


def test_the_end_of_a_run_is_saved(fitted):
    assert torch.load(fitted / "last.ckpt", weights_only=True)["global_step"] == 4
    assert torch.load(best(fitted), weights_only=True)["global_step"] == 3


def test_a_damaged_last_one_is_named_and_passed_over(fitted, caplog):
    truncate(fitted / "last.ckpt")
    main([*FIT, *LAST])
    assert "last.ckpt is truncated or damaged" in caplog.text
    assert f"ckpt_path: {CHECKPOINTS}/{best(fitted).name}" in caplog.text
    # The damaged one is somebody's file, and left as it is.
    assert torch.load(fitted / "last-v1.ckpt", weights_only=True)["global_step"] == 4


def test_a_run_that_is_being_written_is_not_taken_up(fitted, capfd, claiming):
    before = {path: path.read_bytes() for path in fitted.iterdir()}
    with claiming(fitted):
        line = refusal(capfd, *FIT, *LAST)
    assert f"ckpt_path: {CHECKPOINTS}/last.ckpt belongs to a run that another process is writing" in line
    assert {path: path.read_bytes() for path in fitted.iterdir()} == before
    main([*FIT, *LAST])


@pytest.mark.parametrize("clock", [1, -1], ids=["forward", "set back"])
def test_the_last_of_a_run_is_the_one_of_most_steps(tmp_path, clock):
    """Of another run it is the one that wrote last, whatever its steps."""

    def saved(name, run, step, time):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        state = {"settings": {"a": "1"}, "random": [0]}
        content = {"pytorch-lightning_version": "2", "global_step": step, "exact_state": state}
        torch.save(content | ({"mlflow_run": run} if run else {}), path)
        os.utime(path, (1e9 + time, 1e9 + time))
        return path

    first = [saved(f"one/{step}.ckpt", "one", step, clock * step) for step in (2, 3, 1)]
    assert resume.last([tmp_path / "one"], {"a": "1"}) == first[1]
    other = saved("two/1.ckpt", "two", 1, 60)
    assert resume.last([tmp_path / "one", tmp_path / "two"], {"a": "1"}) == other
    # Without runs nothing but the time says which one came later.
    loose = [saved(f"loose/{step}.ckpt", None, step, clock * step + 120) for step in (2, 3, 1)]
    assert resume.last([path.parent for path in (other, loose[0])], {"a": "1"}) == loose[1 if clock > 0 else 2]


def test_a_damaged_one_that_was_named_is_refused(fitted, capfd):
    truncate(fitted / "last.ckpt")
    line = refusal(capfd, *FIT, "--ckpt_path", f"{CHECKPOINTS}/last.ckpt")
    assert "is not a checkpoint, or is truncated or damaged" in line
    assert f"the newest good one in its folder is {CHECKPOINTS}/{best(fitted).name}" in line


def test_all_are_damaged(fitted, capfd):
    truncate(fitted / "last.ckpt")
    truncate(best(fitted))
    assert "finds no good checkpoint; damaged: " in refusal(capfd, *FIT, *LAST)


def test_none_yet(elsewhere, caplog):
    main([*FIT, *LAST])
    assert "no checkpoint to resume from yet, so this is a new run" in caplog.text
    assert torch.load(f"{CHECKPOINTS}/last.ckpt", weights_only=True)["global_step"] == 4


def test_another_configuration_has_none(fitted, caplog):
    main([*FIT, *LAST, "--model.lrsa.top_k", "4", "--trainer.max_steps", "1"])
    assert "model.lrsa.top_k 8 (here 4)" in caplog.text
    assert "so this is a new run" in caplog.text


def test_a_longer_training_is_another_run(fitted, capfd):
    """The schedule of the first one has ended: "last" starts no other run in its place without a word."""
    for checkpoint in ("last", f"{CHECKPOINTS}/last.ckpt"):
        line = refusal(capfd, *FIT, "--trainer.max_steps", "9", "--ckpt_path", checkpoint)
        assert (
            f"the learning-rate schedule of {CHECKPOINTS}/last.ckpt ends at step 4, not at trainer.max_steps 9" in line
        )
        assert f"--model.start_from {CHECKPOINTS}/last.ckpt" in line


def test_without_a_schedule_a_run_goes_on_as_long_as_it_is_told(elsewhere, caplog):
    fit = [*FIT, "--model.lr_scheduler", "null", "--trainer.val_check_interval", "9"]
    main([*fit, "--trainer.max_steps", "1"])
    main([*fit, "--trainer.max_steps", "1", *LAST])
    assert "last.ckpt is at step 1, and trainer.max_steps is 1: nothing is left to train" in caplog.text
    caplog.clear()
    main([*fit, "--trainer.max_steps", "2", *LAST])
    assert "is left to train" not in caplog.text
    assert torch.load(f"{CHECKPOINTS}/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("setting", ["total_steps", "T_max", "total_iters"])
def test_the_length_of_any_schedule(setting):
    name = f"model.lr_scheduler.init_args.{setting}"
    found = resume.About({name: "4", "a": "1"}, 1, None, 4)
    with refused("ckpt_path", reason="ends at step 4, not at trainer.max_steps 9"):
        resume.check_continues(Path("x.ckpt"), found, {name: "9", "a": "1"}, 1, 9)
    # A number that does not follow the length is an ordinary change.
    assert not resume.check_continues(Path("x.ckpt"), found, {name: "5", "a": "1"}, 1, 9)


def test_evaluation_takes_the_last_of_any_rule(fitted, capfd, caplog):
    main(["test", *DEBUG, *NO_LOGGER, *LAST, "--model.lrsa.top_k", "4", "--trainer.limit_test_batches", "1"])
    assert f"ckpt_path: {CHECKPOINTS}/last.ckpt" in caplog.text
    assert "Test on 1 question" in capfd.readouterr().out


def test_evaluation_of_none(capfd):
    assert "last finds no checkpoint" in refusal(capfd, "test", *DEBUG, *NO_LOGGER, *LAST)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--data.init_args.batch_size", "2", "data.init_args.batch_size 1 (here 2)"),
        ("--data.init_args.train", "other.jsonl", "data.init_args.train"),
        ("--seed_everything", "5", "seed_everything 0 (here 5)"),
    ],
)
def test_other_data(fitted, elsewhere, capfd, option, value, said):
    from lrsa_lit.paths import shipped

    shutil.copy(shipped("data/sample.jsonl"), "other.jsonl")
    line = refusal(capfd, *FIT, option, value, "--ckpt_path", f"{CHECKPOINTS}/last.ckpt")
    assert said in line
    assert "changes the order of the training data; resume with the same value, or" in line


def test_other_settings_are_said(fitted, caplog):
    main([*FIT, "--model.lrsa.top_k", "4", "--ckpt_path", str(best(fitted))])
    assert "not equal to an uninterrupted run: model.lrsa.top_k 8 (here 4)" in caplog.text


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"lrsa": {"head_top_k": "x.json"}}, "lrsa.head_top_k"),
        ({"lrsa": {"head_top_k": {"ranking": "x.json", "budget": 0.5}}}, "lrsa.head_top_k.ranking"),
        ({"lrsa": {"system": {"class_path": "DuoAttention", "init_args": {"gates": "x.json"}}}},
         "lrsa.system.init_args.gates"),
        ({"train_attention": {"head_top_k": "x.json"}}, "train_attention.head_top_k"),
    ],
)  # fmt: skip
def test_a_file_of_the_rule_is_known_by_its_content(rule, name, elsewhere):
    def settings(text, path="x.json"):
        (elsewhere / path).write_text(text)
        return settings_of(yaml.safe_load(json.dumps({"model": rule}).replace("x.json", path)))

    before = settings("[[0.5, 1]]")
    assert (
        differences(before, settings("[[0.5, 1]]")) == differences(before, settings("[[0.5, 1]]", "moved.json")) == []
    )
    (change,) = differences(before, settings("[[0.5, 0]]"))
    assert change.startswith(f'model.{name} "file ')


def test_a_fit_goes_on_with_the_budgets_that_it_began_with(elsewhere, caplog):
    (elsewhere / "heads.json").write_text("[[8, 4], 2]")
    budgets = [*FIT, "--model.lrsa.head_top_k", "heads.json", "--trainer.max_steps", "2"]
    main(budgets)
    (elsewhere / "heads.json").write_text("[[8, 4], 3]")
    main([*budgets, "--ckpt_path", f"{CHECKPOINTS}/last.ckpt"])
    assert 'not equal to an uninterrupted run: model.lrsa.head_top_k "file ' in caplog.text


def test_another_number_of_processes(fitted, capfd):
    path = fitted / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["exact_state"]["random"] *= 2
    torch.save(state, path)
    line = refusal(capfd, *FIT, "--ckpt_path", str(path))
    assert "it was written by 2 processes and cannot be resumed with 1" in line
    assert "trainer.devices x trainer.num_nodes = 2" in line


@pytest.fixture
def full_disk(monkeypatch):
    """A disk without room for the second checkpoint of a run and all after it."""
    write, written = checkpoint_io.write_atomically, []

    def writing(path, content):
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(checkpoint_io, "write_atomically", writing)
    return written


def test_a_full_disk_stops_the_run(elsewhere, full_disk, capfd):
    line = refusal(capfd, *FIT, "--trainer.val_check_interval", "2")
    assert f"checkpoint {CHECKPOINTS}/last.ckpt: not saved (No space left on device); {CHECKPOINTS}/step000002" in line
    assert "is intact" in line
    assert len(full_disk) == 2
    (kept,) = (elsewhere / CHECKPOINTS).iterdir()
    assert torch.load(kept, weights_only=True)["global_step"] == 2


def test_a_full_disk_does_not_stop_the_run(elsewhere, full_disk, capfd, caplog, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "trainer: {callbacks: [{class_path: lrsa_lit.checkpoints.SafeModelCheckpoint, init_args: "
        "{monitor: val/loss, save_last: true, on_save_error: continue}}]}"
    )
    main([*FIT, "--config", "mine.yaml", "--trainer.val_check_interval", "2"])
    assert "No space left on device" in caplog.text
    assert "is intact; training continues" in caplog.text
    (kept,) = (elsewhere / CHECKPOINTS).iterdir()
    assert torch.load(kept, weights_only=True)["global_step"] == 2


def test_a_killed_run_goes_on_in_its_own(elsewhere, monkeypatch):
    """What it had recorded after the checkpoint is not recorded twice."""
    fit = ["fit", *DEBUG, "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2"]

    def killed():
        raise SystemError("as if killed")

    with monkeypatch.context() as patch, before_step(3, killed):
        patch.setattr("lrsa_lit.checkpoints.SafeModelCheckpoint.on_exception", lambda *arguments: None)
        with pytest.raises(SystemError):
            main(fit)
    main([*fit, *LAST])
    (run,) = recorded_runs(elsewhere / "runs/mlflow.db", "debug")
    client = MlflowClient(f"sqlite:///{elsewhere}/runs/mlflow.db")
    for name in ("train/loss", "train/lr"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [0, 1, 2, 3]
    assert run.info.status == "FINISHED"
