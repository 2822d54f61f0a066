"""Heartbeats of runs: a running run updates a tag regularly, and opening a store marks runs without heartbeats.

MLflow has no such mechanism: a run whose process or machine died stays RUNNING for ever. On the same machine, a dead
process is detected at once; on another machine, by its missing heartbeats.
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
"""Tag with the time of the run's last heartbeat, in seconds since 1970."""

PROCESS = "heartbeat.process"
"""Tag with the process that writes the run: a digest of its machine, its process id and its start time."""

DIED = "died"
"""Tag with the reason why a run was marked as FAILED by another process."""

EVERY = 60.0
"""Seconds between two heartbeats."""

STALE = 600.0
"""Seconds without a heartbeat after which a run counts as dead; long enough for machines' clocks to differ."""


def tags() -> dict[str, str]:
    """Tags of a run that this process writes."""
    machine, started = _machine(), _started(os.getpid())
    this = {} if machine is None or started is None else {PROCESS: f"{machine} {os.getpid()} {started}"}
    # Set the process first: the tag of a continued run still names the earlier process, which is dead.
    return this | {TAG: f"{time.time():.0f}"}


def beat(client: MlflowClient, run_id: str) -> None:
    """Record a heartbeat, and mark the run as RUNNING again if another process has marked it as dead."""
    run = client.get_run(run_id)
    for name, value in tags().items():
        if run.data.tags.get(name) != value:
            client.set_tag(run_id, name, value)
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    if DIED in run.data.tags:
        client.delete_tag(run_id, DIED)


def mark_dead(client: MlflowClient) -> list[str]:
    """Mark as FAILED each RUNNING run whose process is gone or has had no heartbeat for too long.

    Runs without any heartbeat belong to other programs and are not changed.

    Returns:
        Ids of the runs that were marked now.
    """
    experiments = [found.experiment_id for found in client.search_experiments()]
    marked = []
    for run in client.search_runs(experiments, f"attributes.status = 'RUNNING' AND tags.{TAG} != ''"):
        last, run_id = float(run.data.tags[TAG]), run.info.run_id
        gone = _is_gone(run.data.tags.get(PROCESS, ""))
        if gone or time.time() - last > STALE:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last))
            why = "its process is gone, last heartbeat at" if gone else "no heartbeat since"
            client.set_tag(run_id, DIED, f"{why} {when}")
            client.set_terminated(run_id, "FAILED", end_time=int(last * 1000))
            marked.append(run_id)
    return marked


def _is_gone(process: str) -> bool:
    """Whether a process has certainly ended: it ran on this machine, and its id is free or used by another process."""
    machine, _, rest = process.partition(" ")
    number, _, started = rest.partition(" ")
    return bool(started) and machine == _machine() and _started(int(number)) != started


@functools.cache
def _machine() -> str | None:
    """Digest of the machine's current boot and process namespace, in which process ids are unique; None if unknown."""
    try:
        boot, numbers = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256(f"{platform.node()} {boot} {numbers}".encode()).hexdigest()[:16]


def _started(number: int) -> str | None:
    """Start time of a process in clock ticks; None if there is no such process, or it has ended."""
    try:
        # The process name in brackets may contain any character, so parse after the last bracket.
        fields = Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
