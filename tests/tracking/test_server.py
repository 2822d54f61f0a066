"""Runs on a real tracking server, which may go away."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from cli_helpers import DEBUG, before_step
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from lrsa_lit.cli.main import main
from lrsa_lit.tracking import delivery, logger


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of an `mlflow server` on a free loopback port."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = ["server", "--backend-store-uri", f"sqlite:///{folder}/store.db", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command],
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.2)
    yield uri
    process.terminate()
    process.wait(30)


class Line:
    """A way to the server that can be cut and mended: a relay of connections."""

    def __init__(self, uri):
        self._target = ("127.0.0.1", int(uri.rpartition(":")[2]))
        self._lock, self._open = threading.Lock(), []
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.mend()

    def mend(self):
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self):
        with self._lock:
            # Not close alone, which leaves the port to an accept that waits.
            for end in [self._listener, *self._open]:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._open.clear()

    def _accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            with self._lock:
                self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    @staticmethod
    def _relay(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def line(server):
    line = Line(server)
    yield line
    line.cut()


def runs_of(uri, experiment):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def fit(name, uri, *options):
    logger = ["--trainer.logger.init_args.experiment_name", name, "--trainer.logger.init_args.tracking_uri", uri]
    main(["fit", *DEBUG, *logger, *options])


def test_a_fit_on_a_server(server, elsewhere, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("://", "://joe:hunter2@"))
    main(["fit", *DEBUG, "--trainer.logger.init_args.experiment_name", "environment"])
    (run,) = runs_of(server, "environment")
    assert run.info.status == "FINISHED"
    assert {"train/loss", "val/f1", "perf/step_seconds"} <= set(run.data.metrics)
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs]
    folder = Path(download_artifacts(run_id=run.info.run_id, tracking_uri=server))
    assert "top_k: 8" in (folder / "config.yaml").read_text()
    assert len(json.loads((folder / "predictions.json").read_text())["data"]) == 4
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.lrsa["top_k"] == 8
    assert not list((elsewhere / "runs").rglob("*.safetensors")), "uploaded, and not kept twice"
    assert not (elsewhere / "runs/mlflow.db").exists()
    shown = capfd.readouterr()
    assert f"in {server}" in shown.out
    assert f"tracking_uri: {server}" in (folder / "config.yaml").read_text()
    for text in (shown.out, shown.err, str(run.data), (folder / "config.yaml").read_text()):
        assert "hunter2" not in text


def test_no_server_stops_the_run_at_its_start(elsewhere, capfd):
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        fit("none", "http://127.0.0.1:9")
    assert stop.value.code == 2
    assert time.monotonic() - begun < 30
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lrsa: error:")]
    assert "trainer.logger.init_args.tracking_uri: http://127.0.0.1:9 does not answer (Connection refused)" in said
    assert not list(elsewhere.rglob("*.ckpt"))


def test_what_is_no_tracking_server(capfd, tmp_path):
    import functools
    import http.server

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(SystemExit) as stop:
            fit("none", f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    assert stop.value.code == 2
    assert f"http://127.0.0.1:{other.server_port} does not answer" in capfd.readouterr().err


def test_a_server_that_dies_does_not_stop_the_training(line, server, monkeypatch, caplog, elsewhere):
    with before_step(2, line.cut), monkeypatch.context() as patch:
        patch.setattr(logger, "_SAVE_SECONDS", 0.2)
        patch.setattr(logger, "_FLUSH_SECONDS", 1.0)
        fit("cut", line.uri, "--validate_first", "false")
    assert list((elsewhere / "runs").rglob("last.ckpt"))
    said = [record.message for record in caplog.records if record.name == "lrsa_lit.tracking"]
    assert len([text for text in said if "does not answer (" in text and "sent late" in text]) == 1
    lost = [text for text in said if text.startswith(f"Not delivered to {line.uri}")]
    assert re.search(r"\d+ metric values, .*predictions\.json.*the status FINISHED", lost[-1])
    (run,) = runs_of(server, "cut")
    assert run.info.status == "RUNNING"
    (spool,) = (elsewhere / "runs").rglob("undelivered.jsonl")
    assert f"the metrics are in {spool.relative_to(elsewhere)} and will be sent when the run is resumed" in lost[-1]

    line.mend()
    resumed = ["--validate_first", "false", "--ckpt_path", str(next((elsewhere / "runs").rglob("last.ckpt")))]
    fit("cut", line.uri, *resumed)
    assert not spool.exists()
    (run,) = runs_of(server, "cut")
    assert run.info.status == "FINISHED"
    history = MlflowClient(server).get_metric_history(run.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == [0, 1, 2, 3]


def test_a_server_that_comes_back_misses_nothing(line, server, monkeypatch, caplog):
    noticed = threading.Event()
    late = delivery.reason

    def noticing(error):
        noticed.set()
        return late(error)

    monkeypatch.setattr(delivery, "reason", noticing)
    with before_step(1, line.cut), before_step(3, lambda: (noticed.wait(60), line.mend())):
        fit("mended", line.uri, "--validate_first", "false")
    (run,) = runs_of(server, "mended")
    assert run.info.status == "FINISHED"
    history = MlflowClient(server).get_metric_history(run.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == [0, 1, 2, 3]
    assert "val/f1" in run.data.metrics
    assert "answers again" in caplog.text


def test_the_ui_of_a_server_is_its_own(server, capfd):
    client = MlflowClient(server)
    run = client.create_run(client.create_experiment("served"))
    main(["ui", "--store", server, "--experiment", "served", "--no-browser"])
    address = capfd.readouterr().out.splitlines()[1]
    assert address.startswith(f"{server}/#/compare-runs?")
    assert run.info.run_id in address
