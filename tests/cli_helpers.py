"""What the tests of the command line share."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

DEBUG = ["--config", "configs/debug/tiny.yaml"]
NO_LOGGER = ["--trainer.logger", "false"]


def recorded_runs(store: Path, experiment: str) -> list:
    """The runs of an experiment in an SQLite store, latest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


@contextlib.contextmanager
def interruptible():
    """Start children as from a terminal: background jobs of a shell, this run maybe, ignore Ctrl-C and pass that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
