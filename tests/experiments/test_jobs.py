"""Jobs of this machine: what runs at the same time, what comes next, and how they are stopped."""

import os
import signal
import sys
from pathlib import Path

import pytest

from lrsa_lit.experiments import jobs
from lrsa_lit.experiments.jobs import Executor, Job, OutOfTimeError

MEETS = """
import sys
# Opening either end of the pipe waits for the other one.
open(sys.argv[1], sys.argv[2]).close()
"""
PAUSES = """
import pathlib, signal, sys
def save(number, _):
    pathlib.Path(sys.argv[1] + ".saved").write_text(str(number))
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
pathlib.Path(sys.argv[1]).touch()
signal.pause()
"""


@pytest.fixture(autouse=True)
def _python(tmp_path, monkeypatch):
    """Commands are texts of Python with their arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "command_line", lambda arguments: [sys.executable, "-S", "-E", "-c", *arguments])


def unit(log, *commands, then=()):
    """Commands one after another; their exit codes are logged, and whether they were stopped."""
    try:
        for command in commands:
            log.append((yield Job(lambda command=command: [*command], {}, {}, {})))
    except GeneratorExit:
        log.append("stopped")
        raise
    return then


def test_units_run_at_the_same_time():
    os.mkfifo("pipe")
    log = []
    Executor(60, at_once=2).drive([unit(log, (MEETS, "pipe", end)) for end in "rw"], lambda: None)
    assert log == [0, 0]


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_a_unit_returns_comes_next(at_once):
    started, log = [], []

    def told(name, *then):
        started.append(name)
        return (yield from unit(log, ("import sys; sys.exit(3)",), then=then))

    Executor(at_once=at_once).drive([told("a", told("a1"), told("a2", told("a21"))), told("b")], lambda: None)
    assert log == [3] * 5
    if at_once == 1:
        assert started == ["a", "a1", "a2", "a21", "b"]
    else:
        assert sorted(started) == ["a", "a1", "a2", "a21", "b"]


def ends_once(files, executor, monkeypatch, end):
    """Once the files exist, end; until then there is time for another look at them."""
    monkeypatch.setattr(executor, "left", lambda: end() if all(Path(file).exists() for file in files) else 0.02)


def out_of_time():
    return 0.0


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("end", "error", "number"),
    [(out_of_time, OutOfTimeError, signal.SIGTERM), (interrupt, KeyboardInterrupt, signal.SIGINT)],
)
def test_all_that_run_are_stopped_and_may_save(end, error, number, monkeypatch):
    executor, logs = Executor(at_once=2), ([], [], [])
    ends_once("ab", executor, monkeypatch, end)
    with pytest.raises(error):
        executor.drive([unit(log, (PAUSES, name)) for log, name in zip(logs, "abc", strict=True)], lambda: None)
    assert [Path(f"{name}.saved").read_text() for name in "ab"] == [str(int(number))] * 2
    assert logs == (["stopped"], ["stopped"], [])
    assert not Path("c").exists()


def test_without_time_nothing_is_started():
    log = []
    with pytest.raises(OutOfTimeError):
        Executor(0).drive([unit(log, (PAUSES, "a"))], lambda: None)
    assert log == ["stopped"]
    assert not Path("a").exists()
    Executor(0).drive([unit(log)], lambda: None)
