"""Commands as child processes, so that one that fails or runs out of memory does not affect the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

STOP_SECONDS = 120.0
"""Seconds that a stopped command may take to save its checkpoint."""

EVERY = 60.0
"""Seconds between two heartbeats."""

_EVERY_LOOK = 0.05
"""Seconds between two looks at whether a command has ended."""

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


Unit = Generator[Job, int, "Sequence[Unit] | None"]
"""Consecutive jobs: a generator that yields jobs and is sent their exit codes; it is closed if a job is stopped.

The units that it returns come next, before those that were to come after it.
"""


class Executor:
    """Runs jobs on this machine.

    Args:
        seconds: time limit, after which no job is started and running ones are stopped; None for no limit.
        at_once: number of units whose jobs run at the same time.
    """

    def __init__(self, seconds: float | None = None, at_once: float = 1) -> None:
        self._until = float("inf") if seconds is None else time.monotonic() + seconds - _SPARE
        self._at_once = at_once
        self._waiting: deque[Unit] = deque()
        self._running: dict[Any, tuple[Unit, Job]] = {}

    def left(self) -> float:
        """Seconds until everything is stopped."""
        return self._until - time.monotonic()

    def drive(self, units: Iterable[Unit], beat: Callable[[], None]) -> None:
        """Run all units to completion, and call ``beat`` once a minute.

        Raises:
            OutOfTimeError: the time limit was reached first.
            KeyboardInterrupt: Ctrl-C; the commands have saved their state.
        """
        self._waiting.extend(units)
        due, number = time.monotonic() + EVERY, signal.SIGTERM
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._at_once:
                    self._go_on(self._waiting.popleft())
                if not self._running:
                    continue
                if (left := self.left()) <= 0:
                    raise OutOfTimeError
                for handle, code in self.wait(min(EVERY, left)):
                    self._go_on(self._running.pop(handle)[0], code)
                if time.monotonic() >= due:
                    beat()
                    due = time.monotonic() + EVERY
        except KeyboardInterrupt:
            number = signal.SIGINT
            raise
        finally:
            self.stop([*self._running], number)
            # Closing tells a unit that it was stopped.
            for unit in (*(unit for unit, _ in self._running.values()), *self._waiting):
                unit.close()
            self._running.clear()
            self._waiting.clear()

    def _go_on(self, unit: Unit, code: int | None = None) -> None:
        try:
            job = next(unit) if code is None else unit.send(code)
        except StopIteration as end:
            self._waiting.extendleft(reversed(end.value or ()))
            return
        try:
            if self.left() <= 0:
                raise OutOfTimeError
            self._running[self.start(job)] = unit, job
        except BaseException:
            unit.close()
            raise

    def start(self, job: Job) -> Any:
        """Start a job; returns its handle, which can be a key of a dictionary."""
        return _started(job.command(), job.variables())

    def wait(self, seconds: float) -> list[tuple[Any, int]]:
        """The handles and exit codes of jobs that have ended, as soon as there are any or the time has passed."""
        until = time.monotonic() + seconds
        while True:
            ended = [(process, process.returncode) for process in self._running if process.poll() is not None]
            if ended or time.monotonic() >= until:
                return ended
            # As Popen.wait does for one process.
            time.sleep(_EVERY_LOOK)

    def stop(self, handles: Sequence[Any], number: signal.Signals) -> None:
        """Stop running jobs by a signal, and give them time to save their checkpoints."""
        _stop(handles, number)


def command_line(arguments: list[str]) -> list[str]:
    """The command line that runs ``lrsa`` with some arguments."""
    return [sys.executable, "-m", "lrsa_lit.cli", *arguments]


def run(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Run ``lrsa`` with some arguments and environment variables, and return its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C; the command was stopped by SIGINT and could save its state.
    """
    process = _started(arguments, environment)
    try:
        while True:
            # Without a limit, an interrupt that is no signal would not be noticed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(EVERY)
    except KeyboardInterrupt:
        _stop([process], signal.SIGINT)
        raise


def _started(arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    wrapped = [sys.executable, "-c", _WITH_PARENT] if sys.platform == "linux" else []
    return subprocess.Popen(
        [*wrapped, *command_line(arguments)],
        env=os.environ | dict(environment),
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches only this process, which passes it on exactly once.
        process_group=0,
    )


def _stop(processes: Iterable[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    processes = list(processes)
    for process in processes:
        process.send_signal(number)
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(until - time.monotonic(), 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
