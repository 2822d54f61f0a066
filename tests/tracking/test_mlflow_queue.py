"""What MLflow does by itself, and what its own queue of records loses: why lrsa_lit.tracking has one of its own.

A test of the second kind that fails tells that this MLflow has learned it: then the part of ours that it names can go.
"""

import http.server
import json
import os
import signal
import sqlite3
import threading

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.delivery import Delivery

RUN = "0" * 32


class Server(http.server.ThreadingHTTPServer):
    """A tracking server that takes metrics, or answers that it is out of service."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.down, self.taken = False, []
        self.uri = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.down:
            self.server.taken += [metric.get("step", 0) for metric in content.get("metrics", ())]
        self.send_response(503 if self.server.down else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def metric(step, key="loss", timestamp=1):
    return Metric(key, 0.5, timestamp, step)


def ours(server):
    client = MlflowClient(server.uri)
    return Delivery(lambda metrics: client.log_batch(RUN, metrics=metrics), lambda: None, 3600.0, retry=0.01)


def test_mlflow_drops_what_an_outage_meets_and_this_thread_does_not(server):
    client, own = MlflowClient(server.uri), ours(server)
    server.down = True
    sent = [client.log_batch(RUN, metrics=[metric(step)], synchronous=False) for step in range(3)]
    for operation in sent:
        with pytest.raises(MlflowException):
            operation.wait()
    own.metrics([metric(step) for step in (10, 11)])
    server.down = False
    client.log_batch(RUN, metrics=[metric(3)], synchronous=False).wait()
    assert own.flush(30) == []
    assert [step for step in server.taken if step < 10] == [3]
    assert [step for step in server.taken if step >= 10] == [10, 11]


def test_mlflow_lets_nobody_bound_the_wait_for_its_queue_nor_name_what_it_lost(server):
    """Ours is waited for as long as its caller has patience, and tells what is left."""
    server.down = True
    own = ours(server)
    own.metrics([metric(0), metric(1)])
    own.call("answers.jsonl", lambda: MlflowClient(server.uri).log_batch(RUN, metrics=[metric(2)]))
    assert own.flush(0.01) == ["2 metric values", "answers.jsonl"]
    assert [each.step for each in own.undelivered()] == [0, 1]
    server.down = False
    assert own.flush(30) == []


def test_mlflow_s_queue_is_no_place_for_the_status_of_a_run(server):
    server.down = True
    with pytest.raises(MlflowException):
        MlflowClient(server.uri).set_terminated(RUN, "FINISHED")


def test_mlflow_s_queue_drops_what_a_file_does_not_take_for_a_while(tmp_path):
    """The database answers, and says that it cannot: as on a full disk."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("ALTER TABLE metrics RENAME TO elsewhere")
    database.commit()
    tried = threading.Event()

    def send(metrics):
        try:
            client.log_batch(run_id, metrics=metrics)
        finally:
            tried.set()

    own = Delivery(send, lambda: None, 3600.0, retry=0.01)
    with pytest.raises(MlflowException):
        client.log_batch(run_id, metrics=[metric(0, "theirs")], synchronous=False).wait()
    own.metrics([metric(0, "ours")])
    assert tried.wait(30)
    database.execute("ALTER TABLE elsewhere RENAME TO metrics")
    database.commit()
    assert own.flush(30) == []
    assert set(client.get_run(run_id).data.metrics) == {"ours"}


def test_mlflow_leaves_a_killed_run_running_and_the_heartbeat_does_not(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("e")
    told, tell = os.pipe()
    if not (child := os.fork()):
        own = MlflowClient(uri)
        runs = [own.create_run(experiment, tags=tags).info.run_id for tags in ({}, heartbeat.tags())]
        os.write(tell, " ".join(runs).encode())
        signal.pause()
    theirs, with_heartbeat = os.read(told, 200).decode().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert heartbeat.mark_dead(client) == [with_heartbeat]
    assert client.get_run(theirs).info.status == "RUNNING"


def test_mlflow_tells_what_was_sent_twice_from_what_was_measured_twice(tmp_path):
    """So a batch of which nobody knows whether it arrived may be sent again."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    for metrics in ([metric(0), metric(1)], [metric(1), metric(2)], [metric(2, timestamp=9)]):
        client.log_batch(run_id, metrics=metrics)
    assert [(each.step, each.timestamp) for each in client.get_metric_history(run_id, "loss")] == [
        (0, 1), (1, 1), (2, 1), (2, 9),
    ]  # fmt: skip


def test_mlflow_divides_a_batch_that_is_too_large(server):
    MlflowClient(server.uri).log_batch(RUN, metrics=[metric(step) for step in range(2500)])
    assert server.taken == list(range(2500))
