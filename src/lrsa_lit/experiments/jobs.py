"""Commands as child processes: one that fails, or is out of memory, leaves the others alone."""

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
"""How long a stopped command may take to save its checkpoint."""

EVERY = 60.0
"""Seconds between two signs of life."""

_SPARE = 15.0
"""Seconds before the end of the time at which a command is stopped: to write a checkpoint of a small model."""

_CONTEXT = "MLFLOW_RUN_CONTEXT"

# A parent that is killed takes the child along (PR_SET_PDEATHSIG), so that nobody else writes the child's checkpoints.
_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class Job(NamedTuple):
    """One command.

    Attributes:
        command: its arguments behind ``lrsa``; asked for each time that it is begun, since there may be a checkpoint.
        tags: of the MLflow run that it makes.
        environment: variables that it needs.
        trainer: its settings of the trainer, which say what devices it takes.
    """

    command: Callable[[], list[str]]
    tags: Mapping[str, str]
    environment: Mapping[str, str]
    trainer: Mapping[str, object]

    def variables(self) -> dict[str, str]:
        """What its process has in its environment beside what its machine has."""
        # MLflow adds these tags to the runs of the process; the command's own config stays what it is.
        tags = json.loads(os.environ.get(_CONTEXT) or "{}") | dict(self.tags)
        return {**self.environment, _CONTEXT: json.dumps(tags)}


class OutOfTimeError(Exception):
    """The minutes are over; what is done is on the disk."""


Unit = Generator[Job, int, None]
"""Jobs that follow from each other: it yields what is to be run, and is sent the exit code or, where that is stopped,
closed."""


class Executor:
    """Runs jobs one after the other on this machine.

    Args:
        seconds: after which nothing new is begun, and what runs is stopped; None for no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._until = float("inf") if seconds is None else time.monotonic() + seconds - _SPARE

    def left(self) -> float:
        """Seconds until all is stopped."""
        return self._until - time.monotonic()

    def drive(self, units: Iterable[Unit], beat: Callable[[], None]) -> None:
        """Run all units to their ends, and call ``beat`` once a minute.

        Raises:
            OutOfTimeError: there was no time for all of them.
            KeyboardInterrupt: Ctrl-C, after which the commands have saved what they had.
        """
        for unit in units:
            # One that is stopped hears of it, as it is closed.
            with contextlib.closing(unit), contextlib.suppress(StopIteration):
                job = next(unit)
                while True:
                    if self.left() <= 0:
                        raise OutOfTimeError
                    job = unit.send(run(job.command(), job.variables(), self.left, beat))


def command_line(arguments: list[str]) -> list[str]:
    """The process of a command."""
    return [sys.executable, "-m", "lrsa_lit.cli", *arguments]


def run(
    arguments: list[str], environment: Mapping[str, str], left: Callable[[], float], beat: Callable[[], None]
) -> int:
    """Run the command ``lrsa`` with some arguments and variables, ``beat`` once a minute; returns its exit code.

    Raises:
        OutOfTimeError: ``left`` says that no seconds are left; the command was stopped by SIGTERM.
        KeyboardInterrupt: Ctrl-C; the command was stopped in order, too.
    """
    wrapped = [sys.executable, "-c", _WITH_PARENT] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [*wrapped, *command_line(arguments)],
        env=os.environ | dict(environment),
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches this process alone, which hands it on: once.
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
