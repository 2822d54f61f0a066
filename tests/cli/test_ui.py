"""``lrsa ui``: the real server on a recorded store, and what it says when it cannot."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request

import psutil
import pytest
from cli_helpers import interruptible, refusal
from mlflow.tracking import MlflowClient

from lrsa_lit.cli import ui
from lrsa_lit.cli.main import main


@pytest.fixture
def store(elsewhere):
    """Two experiments: `old` with two runs and the parent of one of them, `new` with the latest run."""
    uri = f"sqlite:///{elsewhere}/runs/mlflow.db"
    (elsewhere / "runs").mkdir()
    client = MlflowClient(uri)
    old, new, _ = (client.create_experiment(name) for name in ("old", "new", "none"))
    parent = client.create_run(old, run_name="parent")
    for number, tags in enumerate(({}, {"mlflow.parentRunId": parent.info.run_id})):
        client.create_run(old, run_name=f"child{number}", tags=tags)
    client.create_run(new, run_name="latest")
    return uri


def compared(client, address):
    """Experiment and run names that an address compares."""
    page, _, query = address.partition("#/")[2].partition("?")
    assert page == "compare-runs"
    asked = urllib.parse.parse_qs(query)
    names = {client.get_run(run_id).info.run_name for run_id in json.loads(asked["runs"][0])}
    return [client.get_experiment(found).name for found in json.loads(asked["experiments"][0])], names


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_server_answers_and_leaves_nothing_behind(store, number):
    command = [sys.executable, "-m", "lrsa_lit.cli", "ui", "--port", "0", "--no-browser", "--experiment", "old"]
    with interruptible():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "Runs of 'old', side by side:\n"
        address = process.stdout.readline().strip()
        assert compared(MlflowClient(store), address) == (["old"], {"child0", "child1"})
        base = address.partition("/training#")[0]
        assert process.stdout.readline() == "In a table:\n"
        table = process.stdout.readline()
        experiment = MlflowClient(store).get_experiment_by_name("old")
        assert table.startswith(f"{base}/training#/experiments/{experiment.experiment_id}/runs?")
        (shared,) = [name for name in experiment.tags if name.startswith("mlflow.sharedViewState.")]
        assert f"viewStateShareKey={shared.rpartition('.')[2]}" in table
        assert base.startswith("http://127.0.0.1:")
        assert b"<html" in urllib.request.urlopen(base, timeout=60).read()
        assert {found.name for found in MlflowClient(base).search_experiments()} == {"Default", "old", "new", "none"}
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(number)
        assert process.wait(60) == 0
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert "Traceback" not in process.stderr.read()
    finally:
        # A failed test must not leave a server behind either.
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        process.stdout.close()
        process.stderr.close()


def test_the_latest_runs_experiment_is_the_default(store):
    client = MlflowClient(store)
    experiment = ui._experiment(client, store, None)
    assert compared(client, ui.compare_page(client, experiment)) == (["new"], {"latest"})


def bad_inputs():
    yield "unknown experiment", ["--experiment", "odl"], ["--experiment: odl", "nearest are old"]
    yield "experiment without runs", ["--experiment", "none"], ["--experiment: 'none' has no runs"]
    yield "missing store", ["--store", "sqlite:///nowhere.db"], ["--store: sqlite:///nowhere.db does not exist"]
    yield "empty file", ["--store", "sqlite:///empty.db"], ["--store: sqlite:///empty.db is empty"]
    yield "no SQLite file", ["--store", "sqlite:///text.db"], ["--store", "text.db is not an SQLite file"]
    yield "file store", ["--store", "./mlruns"], ["--store: './mlruns' is not allowed", "sqlite:///PATH"]
    yield "no server", ["--store", "http://127.0.0.1:9"], ["--store: http://127.0.0.1:9 does not answer"]
    yield "port taken", ["--port", "TAKEN"], ["--port: ", "is not free", "0 for any"]
    yield "port out of range", ["--port", "65536"], ["--port: '65536' is not allowed", "0 to 65535"]
    yield "unknown option", ["--prot", "1"], ["--prot", "lrsa ui --help"]


@pytest.mark.parametrize(("arguments", "named"), [pytest.param(*case[1:], id=case[0]) for case in bad_inputs()])
def test_bad_input_is_one_line(arguments, named, store, elsewhere, capfd):
    (elsewhere / "empty.db").touch()
    (elsewhere / "text.db").write_text("no database, but long enough to hold a header")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        main(["ui", *(str(taken.getsockname()[1]) if part == "TAKEN" else part for part in arguments)])
    assert stop.value.code == 2
    shown = capfd.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "INFO" not in line]
    assert line.startswith("lrsa: error: ")
    for part in named:
        assert part in line
    assert shown.out == ""
    assert not (elsewhere / "nowhere.db").exists()


def test_a_store_without_runs(elsewhere, capfd):
    (elsewhere / "runs").mkdir()
    MlflowClient(f"sqlite:///{elsewhere}/runs/mlflow.db").create_experiment("e")
    assert "has no runs yet" in refusal(capfd, "ui")


def test_a_server_that_dies_while_starting(store, monkeypatch, capfd):
    monkeypatch.setattr(ui, "_command", lambda uri, port: [sys.executable, "-c", "raise SystemExit('out of luck')"])
    assert refusal(capfd, "ui", "--port", "0", "--no-browser").endswith("the MLflow server did not start: out of luck")


def test_a_server_that_dies_later(store, monkeypatch, capfd):
    """It answers once, then ends."""
    code = """
import http.server, sys
class Once(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Once).handle_request()
print("that was all")
"""
    monkeypatch.setattr(ui, "_command", lambda uri, port: [sys.executable, "-c", code, str(port)])
    assert "has stopped unexpectedly" in refusal(capfd, "ui", "--port", "0", "--no-browser")


def test_the_browser_is_opened_only_where_there_is_a_screen(monkeypatch, capfd):
    opened = []
    monkeypatch.setattr(ui.webbrowser, "open", opened.append)
    monkeypatch.setattr(ui.sys, "platform", "linux")
    for display, browser in ((":0", True), (":0", False), (None, True)):
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(monkeypatch.context())
            patch.setenv("DISPLAY", display) if display else patch.delenv("DISPLAY", raising=False)
            ui._show("e", [f"http://x/{browser}{display}", "http://x/table"], browser)
    assert opened == ["http://x/True:0"]
    assert os.linesep.join(["Runs of 'e', side by side:", "http://x/TrueNone"]) in capfd.readouterr().out
