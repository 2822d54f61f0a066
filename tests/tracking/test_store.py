"""Opening a store, and the runs in it that died without a word."""

import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
import pytest
from helpers import refused
from mlflow.tracking import MlflowClient

from lrsa_lit.tracking import heartbeat, store
from lrsa_lit.tracking.store import checked_uri, connect, default_uri, existing_uri, find_experiment


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def silent_run(client, experiment, seconds):
    run = client.create_run(experiment, tags={heartbeat.TAG: str(time.time() - seconds)})
    return run.info.run_id


def test_the_default_is_the_one_of_cli_yaml(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri() == "sqlite:///runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert default_uri() == "http://somewhere:5000"


def test_a_store_is_opened_by_one_process_at_a_time(uri, monkeypatch):
    names = []

    class Noted(filelock.FileLock):
        def acquire(self, *args, **kwargs):
            names.append(self.lock_file)
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(filelock, "FileLock", Noted)
    connect(uri)
    (name,) = names
    # MLflow makes the tables with a client or, at the latest, at its first question.
    asked = {}

    def noting(method):
        def noted(*args, **kwargs):
            try:
                with filelock.UnixFileLock(name, timeout=0):
                    asked.setdefault(method.__name__, "free")
            except filelock.Timeout:
                asked.setdefault(method.__name__, "held")
            return method(*args, **kwargs)

        return noted

    for method in (MlflowClient.__init__, MlflowClient.search_experiments):
        monkeypatch.setattr(MlflowClient, method.__name__, noting(method))
    connect(uri)
    assert asked == {"__init__": "held", "search_experiments": "held"}
    assert names == [name, name]
    with filelock.UnixFileLock(name, timeout=0):
        monkeypatch.setattr(store, "_TURN", 0)
        with refused("tracking_uri", reason="does not answer"):
            connect(uri)


def test_silent_runs_are_marked_when_the_store_is_opened(uri):
    client = MlflowClient(uri)
    experiment = client.create_experiment("e")
    dead = silent_run(client, experiment, heartbeat.STALE + 60)
    alive = silent_run(client, experiment, heartbeat.STALE - 60)
    foreign = client.create_run(experiment).info.run_id
    ended = silent_run(client, experiment, heartbeat.STALE + 60)
    client.set_terminated(ended)

    connect(uri)
    status = {run: client.get_run(run).info.status for run in (dead, alive, foreign, ended)}
    assert status == {dead: "FAILED", alive: "RUNNING", foreign: "RUNNING", ended: "FINISHED"}
    assert "no heartbeat since" in client.get_run(dead).data.tags[heartbeat.DIED]
    assert heartbeat.mark_dead(client) == []


def test_a_run_whose_process_is_gone_is_marked_at_once(uri):
    client = MlflowClient(uri)
    experiment = client.create_experiment("e")
    code = "import sys; from lrsa_lit.tracking import heartbeat; print(heartbeat.tags()[heartbeat.PROCESS])"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    machine, number, started = heartbeat.tags()[heartbeat.PROCESS].split()
    written = {
        "dead": dead,
        "alive": f"{machine} {number} {started}",
        "another of that number": f"{machine} {number} {int(started) - 1}",
        "of another machine": f"0000 {dead.split(' ', 1)[1]}",
    }
    runs = {}
    for name, process in written.items():
        tags = heartbeat.tags() | {heartbeat.PROCESS: process}
        runs[name] = client.create_run(experiment, tags=tags).info.run_id
    assert set(heartbeat.mark_dead(client)) == {runs["dead"], runs["another of that number"]}
    assert "process is gone" in client.get_run(runs["dead"]).data.tags[heartbeat.DIED]
    # Somebody takes it up again.
    heartbeat.beat(client, runs["dead"])
    assert client.get_run(runs["dead"]).data.tags[heartbeat.PROCESS] == written["alive"]
    assert heartbeat.mark_dead(client) == []


def test_a_cache_that_cannot_be_written_does_not_matter(uri, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", "/proc/nowhere")
    assert connect(uri).search_experiments()


def test_a_run_that_was_only_asleep_comes_back(uri):
    client = MlflowClient(uri)
    run_id = silent_run(client, client.create_experiment("e"), heartbeat.STALE + 60)
    assert heartbeat.mark_dead(client) == [run_id]
    heartbeat.beat(client, run_id)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert heartbeat.DIED not in run.data.tags
    assert heartbeat.mark_dead(client) == []


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        # Port 9 (discard) is never a tracking server, and nothing listens there.
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://no-such-host.invalid", "Name or service not known|No address|failure in name"),
    ],
)
def test_a_server_that_is_not_there(uri, why):
    begun = time.monotonic()
    with refused("k", reason=uri) as caught:
        connect(uri, "k")
    assert re.search(why, caught.value.reason)
    assert time.monotonic() - begun < 30


def test_a_database_that_is_no_store(tmp_path, uri):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('nonsense')")
    database.close()
    with refused("k", reason="mlflow.db does not answer"):
        connect(uri, "k")


@pytest.mark.parametrize(("content", "why"), [(None, "does not exist"), (b"", "is empty")])
def test_a_store_that_must_be_there(content, why, tmp_path, uri):
    if content is not None:
        (tmp_path / "mlflow.db").write_bytes(content)
    with refused("--store", reason=f"{uri} {why}"):
        existing_uri(uri, "--store")


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_a_read_only_store(locked):
    """Root may write everywhere, so this is somebody else for a moment."""
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Path(name) / "mlflow.db"
        store.write_bytes(b"SQLite format 3\0")
        store.chmod(0o444 if locked == "file" else 0o666)
        folder.chmod(0o777 if locked == "file" else 0o555)
        effective = os.geteuid()
        try:
            if effective == 0:
                os.seteuid(65534)
            with refused("--store", reason="cannot be written"):
                existing_uri(f"sqlite:///{store}", "--store")
        finally:
            os.seteuid(effective)
            folder.chmod(0o777)


def test_what_names_no_store():
    with refused("--store", "file:./x", "sqlite:///PATH"):
        checked_uri("file:./x", "--store")


def test_the_nearest_experiments_are_named(uri):
    client = MlflowClient(uri)
    for name in ("quickstart", "debug"):
        client.create_experiment(name)
    assert find_experiment(client, "debug", "k").name == "debug"
    with refused("--experiment", reason="quickstart"):
        find_experiment(client, "quikstart", "--experiment")
