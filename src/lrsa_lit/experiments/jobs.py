"""Commands as child processes, so that one that fails or runs out of memory does not affect the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import NamedTuple

STOP_SECONDS = 120.0
"""Seconds that a stopped command may take to save its checkpoint."""

EVERY = 60.0
"""Seconds between two heartbeats."""

_SPARE = 15.0
"""A command is stopped this many seconds before the time limit, to have time to write a small checkpoint."""

_CONTEXT = "MLFLOW_RUN_CONTEXT"

# PR_SET_PDEATHSIG kills the child with its parent, so that no orphan keeps writing the child's checkpoints.
_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class Job(NamedTuple):
    """One command.

    Attributes:
        command: returns the arguments after ``lrsa``. It is called at each start, because there may be a checkpoint to
            resume from by then.
        tags: tags of the MLflow run that the command makes.
        environment: environment variables that the command needs.
        trainer: its trainer settings, which decide the devices.
    """

    command: Callable[[], list[str]]
    tags: Mapping[str, str]
    environment: Mapping[str, str]
    trainer: Mapping[str, object]

    def variables(self) -> dict[str, str]:
        """Environment variables of its process, in addition to those of the machine."""
        # MLflow adds these tags to the runs of the process without a change of the command's config.
        tags = json.loads(os.environ.get(_CONTEXT) or "{}") | dict(self.tags)
        return {**self.environment, _CONTEXT: json.dumps(tags)}


class OutOfTimeError(Exception):
    """Raised when the time limit is reached; finished work is on the disk."""


Unit = Generator[Job, int, None]
"""Consecutive jobs: a generator that yields jobs and is sent their exit codes; it is closed if a job is stopped."""


class Executor:
    """Runs jobs one after another on this machine.

    Args:
        seconds: time limit, after which no job is started and the running one is stopped; None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._until = float("inf") if seconds is None else time.monotonic() + seconds - _SPARE

    def left(self) -> float:
        """Seconds until everything is stopped."""
        return self._until - time.monotonic()

    def drive(self, units: Iterable[Unit], beat: Callable[[], None]) -> None:
        """Run all units to completion, and call ``beat`` once a minute.

        Raises:
            OutOfTimeError: the time limit was reached first.
            KeyboardInterrupt: Ctrl-C; the commands have saved their state.
        """
        for unit in units:
            # Closing tells a unit that it was stopped.
            with contextlib.closing(unit), contextlib.suppress(StopIteration):
                job = next(unit)
                while True:
                    if self.left() <= 0:
                        raise OutOfTimeError
                    job = unit.send(run(job.command(), job.variables(), self.left, beat))


def command_line(arguments: list[str]) -> list[str]:
    """The command line that runs ``lrsa`` with some arguments."""
    return [sys.executable, "-m", "lrsa_lit.cli", *arguments]


def run(
    arguments: list[str], environment: Mapping[str, str], left: Callable[[], float], beat: Callable[[], None]
) -> int:
    """Run ``lrsa`` with some arguments and environment variables, and return its exit code.

    ``beat`` is called once a minute.

    Raises:
        OutOfTimeError: ``left`` returned no more seconds; the command was stopped by SIGTERM.
        KeyboardInterrupt: Ctrl-C; the command was stopped by SIGINT and could save its state.
    """
    wrapped = [sys.executable, "-c", _WITH_PARENT] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [*wrapped, *command_line(arguments)],
        env=os.environ | dict(environment),
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches only this process, which passes it on exactly once.
        process_group=0,
    )
    try:
        while left() > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(EVERY, left()))
            beat()
    except KeyboardInterrupt:
        _stop(process, signal.SIGINT)
        raise
    _stop(process, signal.SIGTERM)
    raise OutOfTimeError


def _stop(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    process.send_signal(number)
    try:
        process.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
