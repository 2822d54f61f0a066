"""Signs of life: a run says now and then that it lives, and who opens its store marks the ones that fell silent.

MLflow has nothing of the kind: a run whose process was killed, or whose machine was, counts as running for ever. On the
same machine it is known at once that a process is gone, on another one by its silence.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "heartbeat"
"""When the run's process last said that it lives, in seconds since 1970."""

PROCESS = "heartbeat.process"
"""Which process writes the run: a digest of its machine, its number and when it was started."""

DIED = "died"
"""Why a run counts as failed that its own process did not end."""

EVERY = 60.0
"""Seconds between two signs of life."""

STALE = 600.0
"""Seconds of silence after which a run counts as dead: long enough for the clocks of two machines to differ."""


def tags() -> dict[str, str]:
    """Tags of a run that this process has begun."""
    machine, started = _machine(), _started(os.getpid())
    this = {} if machine is None or started is None else {PROCESS: f"{machine} {os.getpid()} {started}"}
    # The process first: the one before, which a run was taken over from, is dead.
    return this | {TAG: f"{time.time():.0f}"}


def beat(client: MlflowClient, run_id: str) -> None:
    """Say that a run lives, whatever somebody concluded from a longer silence."""
    run = client.get_run(run_id)
    for name, value in tags().items():
        if run.data.tags.get(name) != value:
            client.set_tag(run_id, name, value)
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    if DIED in run.data.tags:
        client.delete_tag(run_id, DIED)


def mark_dead(client: MlflowClient) -> list[str]:
    """Mark as failed each run that counts as running but whose process is gone or has been silent for too long.

    Runs without a sign of life are another program's and left alone. Returned are the ids of the runs marked now.
    """
    experiments = [found.experiment_id for found in client.search_experiments()]
    marked = []
    for run in client.search_runs(experiments, f"attributes.status = 'RUNNING' AND tags.{TAG} != ''"):
        last, run_id = float(run.data.tags[TAG]), run.info.run_id
        gone = _is_gone(run.data.tags.get(PROCESS, ""))
        if gone or time.time() - last > STALE:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last))
            why = "its process is gone, last sign of life at" if gone else "no sign of life since"
            client.set_tag(run_id, DIED, f"{why} {when}")
            client.set_terminated(run_id, "FAILED", end_time=int(last * 1000))
            marked.append(run_id)
    return marked


def _is_gone(process: str) -> bool:
    """Whether a process is known to have ended: one of this machine, whose number is free or another's now."""
    machine, _, rest = process.partition(" ")
    number, _, started = rest.partition(" ")
    return bool(started) and machine == _machine() and _started(int(number)) != started


@functools.cache
def _machine() -> str | None:
    """Within which numbers of processes mean the same, until it is started anew; None where that cannot be told."""
    try:
        boot, numbers = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"{platform.node()} {boot} {numbers}".encode()).hexdigest()[:16]


def _started(number: int) -> str | None:
    """When a process was started, in ticks of the machine; None if there is none, or it has ended."""
    try:
        # The name, which stands in brackets, may hold any character.
        fields = Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
