"""Evaluations in worker processes: the same results, in time, and no process is left behind."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import yaml
from cli_helpers import interruptible
from helpers import one_line
from study.conftest import STUDY, examples, without_times

from lrsa_lit.errors import UserError
from lrsa_lit.study import settings, tokens
from lrsa_lit.study.plan import Study
from lrsa_lit.study.results import read_lines
from lrsa_lit.study.runner import Runner
from lrsa_lit.study.shards import BATCH, Evaluator, Weights, joined, shard_size, shards_of
from lrsa_lit.study.workers import OutOfTimeError, Workers


@pytest.fixture
def many(tmp_path):
    """A file of more questions than a batch of the loss has."""
    path = tokens.path_of(tmp_path / "many", "plain", "test")
    tokens.write(path, examples("test", 2 * BATCH + 3))
    return path


def pieces(study_file, path, *, size=BATCH, count=2 * BATCH + 3, generates=True, names=("4x", "dense")) -> list:
    study = Study(str(study_file))
    weights = Weights(study.row("base"), None, None)
    options = {"generates": generates, "whole_text": False}
    return [shards_of(weights, study.inference[name], path, count, size, **options) for name in names]


def children() -> list:
    return [process for process in multiprocessing.active_children() if process.name.startswith("SpawnProcess")]


def test_pieces_are_of_whole_batches_and_in_order(study_file, many):
    shards, _ = pieces(study_file, many)
    assert [(shard.kind, shard.questions) for shard in shards] == [
        ("answers", (0, 8)), ("answers", (8, 16)), ("answers", (16, 19)), ("survival", (0, 16))]  # fmt: skip
    (losses, _) = pieces(study_file, many, generates=False)
    assert [shard.kind for shard in losses] == ["losses"] * 3
    assert shard_size(1600, 16) == 56
    assert shard_size(3, 16) == BATCH
    assert shard_size(10**6, 16) % BATCH == 0
    assert shard_size(10**6, 0) == 10**6


def test_pieces_make_the_whole(study_file, many):
    evaluate = Evaluator()
    for cut, whole in zip(pieces(study_file, many), pieces(study_file, many, size=100), strict=True):
        one, other = (joined([evaluate(shard) for shard in shards]) for shards in (cut, whole))
        assert one._replace(seconds=0) == other._replace(seconds=0)


def test_workers_find_what_one_process_finds(study_file, data, many, tmp_path):
    os.replace(many, tokens.path_of(data, "plain", "test"))
    lines = []
    for count in (0, 2):
        out = tmp_path / f"{count}.jsonl"
        # The second one evaluates the weights of the first one.
        runner = Runner(Study(str(study_file)), data, out, tmp_path / "work", 1e6, workers=count)
        assert runner.run("main")
        lines.append({(line["row"], line["attention"], line["set"]): line for line in without_times(read_lines(out))
                      if line["kind"] == "evaluation"})  # fmt: skip
        assert not children()
    assert len(lines[0]) == 8
    assert lines[0] == lines[1]
    assert len(lines[0]["lrsa", "4x", "plain"]["text"]) == 2 * BATCH + 3


@pytest.mark.parametrize("noticed", [False, True])
def test_what_goes_wrong_in_a_worker_comes_up_as_it_is_and_its_death_is_no_wait(noticed, study_file, many, tmp_path):
    ((missing, *_), _) = pieces(study_file, tmp_path / "none.npz")
    with Workers(1, lambda: 100.0) as workers:
        workers.start()
        workers.settle()
        with pytest.raises(UserError) as error:
            list(workers.run([[missing]]))
        assert "none.npz: no such file" in one_line(error.value)
        (child,) = children()
        # What is asked of a worker that is dead, or dies before the pool has seen it.
        lost = workers._pool.submit(os.kill, child.pid, signal.SIGKILL)
        if noticed:
            assert isinstance(lost.exception(), BrokenProcessPool)
        with pytest.raises(UserError) as error:
            list(workers.run(pieces(study_file, many)))
    assert "--workers" in one_line(error.value)
    assert not children()


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_begun_that_took_longer_than_what_is_left(count, study_file, many):
    left = [1e6]
    with Workers(count, lambda: left[0]) as workers:
        one, two = pieces(study_file, many, generates=False, names=("4x", "dense"))
        ((_, outcome),) = workers.run([one])
        assert len(outcome.answers.loss) == 2 * BATCH + 3
        # Enough for a piece of the second evaluation, but not for all of them.
        workers._took = {one[0].work: 1.0}
        left[0] = 12.0
        with pytest.raises(OutOfTimeError):
            list(workers.run([two]))
        left[0] = 1e6
        assert [number for number, _ in workers.run([two])] == [0]


def test_what_is_not_done_in_time_is_dropped(study_file, many):
    asked = itertools.count()
    # There is time when it is begun, and none when it is waited for.
    with Workers(1, lambda: 1.0 if next(asked) == 0 else 0.0) as workers:
        with pytest.raises(OutOfTimeError):
            list(workers.run(pieces(study_file, many)))
        assert children()
    assert not children()
    # They may be started again.
    with workers:
        workers.start()
        assert children()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_workers_do_not_outlive_a_call(sent, study_file, data, tmp_path):
    # An evaluation that takes longer than any test.
    long = {"model": {"max_new_tokens": 10**6}}
    study_file.write_text(yaml.safe_dump(settings.merged(STUDY, long), sort_keys=False))
    arguments = ["run", str(study_file), "--part", "main", "--data", str(data), "--out", str(tmp_path / "r.jsonl")]
    command = [sys.executable, "-m", "lrsa_lit.study", *arguments, "--workers", "1", "--work", str(tmp_path / "work")]
    with interruptible():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    for line in process.stdout:
        if "trained, loss" in line:
            break
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    # Its end comes when the last process has closed it.
    _, errors = process.communicate(timeout=120)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip().splitlines()[-1] == "lrsa: interrupted"
        assert "Traceback" not in errors
