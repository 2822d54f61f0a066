"""Signs of life: a run says now and then that it lives, and who opens its store marks the ones that fell silent.

A process that is killed, or whose machine is, cannot say that its run has ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "heartbeat"
"""When the run's process last said that it lives, in seconds since 1970."""

DIED = "died"
"""Why a run counts as failed that its own process did not end."""

EVERY = 60.0
"""Seconds between two signs of life."""

STALE = 600.0
"""Seconds of silence after which a run counts as dead: long enough for the clocks of two machines to differ."""


def beat(client: MlflowClient, run_id: str) -> None:
    """Say that a run lives, whatever somebody concluded from a longer silence."""
    client.set_tag(run_id, TAG, f"{time.time():.0f}")
    run = client.get_run(run_id)
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    if DIED in run.data.tags:
        client.delete_tag(run_id, DIED)


def mark_dead(client: MlflowClient) -> list[str]:
    """Mark as failed each run that counts as running but has been silent for too long.

    Runs without a sign of life are another program's and left alone.

    Returns:
        The ids of the runs marked now.
    """
    experiments = [found.experiment_id for found in client.search_experiments()]
    running = client.search_runs(experiments, f"attributes.status = 'RUNNING' AND tags.{TAG} != ''")
    marked = []
    for run in running:
        last = float(run.data.tags[TAG])
        if time.time() - last > STALE:
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(last))
            client.set_tag(run.info.run_id, DIED, f"no sign of life since {when}")
            client.set_terminated(run.info.run_id, "FAILED", end_time=int(last * 1000))
            marked.append(run.info.run_id)
    return marked
