"""``lrsa ui``: the MLflow UI on the project's store, with the runs of an experiment side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import IO, TYPE_CHECKING

from lrsa_lit.cli.arguments import Parser, integer, terminable
from lrsa_lit.errors import UserError, redacted
from lrsa_lit.tracking.store import (
    SERVER,
    answering,
    artifact_location,
    connect,
    default_uri,
    existing_uri,
    find_experiment,
    mark,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

HOST = "127.0.0.1"
"""Loopback only: the UI lets anybody who reaches it delete runs."""

_STORE = "--store"
_START_SECONDS = 180.0
_STOP_SECONDS = 15.0
_MOST_COMPARED = 50
"""The number of runs in a comparison's address, latest first; more can be chosen in the UI."""

_COLUMNS = [
    *(f"tags.`{name}`" for name in ("command", "rule", "checkpoint")),
    "params.`kv_ratio`",
    *(f"metrics.`{name}`" for name in ("val/f1", "val/loss", "test/f1", "test/loss")),
]
"""Columns of the table of runs; more can be chosen in the UI. Headings have room for a dozen letters."""

_VIEW = "lrsa"
_TRAINING = "workflowType=machine_learning"
"""Part of an address: without it, a new browser opens MLflow's pages for GenAI, which show no runs. Links lose it."""

_APP = "lrsa"
_TRAINING_PATH = "/training"
"""The page of our own server that makes a new browser remember it (``lrsa_lit.tracking.training_view``)."""

EPILOG = """\
examples:
  lrsa ui
  lrsa ui --experiment quickstart --port 5001
  lrsa ui --store http://tracking.example:5000     prints the addresses on a running server

There, links lead a new browser to MLflow's pages for GenAI. Switch to model training once; the browser remembers it.
"""


def run(arguments: Sequence[str]) -> None:
    """Run the command until Ctrl-C; a mistake, a store without runs or a server that does not start is a UserError."""
    options = _parse(arguments)
    uri = existing_uri(options.store or default_uri(), _STORE)
    runs_already = uri.startswith(SERVER)
    port = 0 if runs_already else _free_port(options.port)
    client = connect(uri, _STORE)
    with answering(uri, _STORE):
        experiment = _experiment(client, uri, options.experiment)
        mark(client, experiment)
        pages = [page(client, experiment) for page in (compare_page, table_page, run_page)]
    base = redacted(uri).rstrip("/") if runs_already else f"http://{HOST}:{port}"
    path = "/" if runs_already or not _has_training_view() else _TRAINING_PATH
    addresses = [f"{base}{path}{page}" for page in pages]
    if runs_already:
        _show(experiment.name, addresses, options.browser)
        return
    with contextlib.suppress(KeyboardInterrupt), terminable(), _server(uri, port) as (process, log):
        print(f"Starting the MLflow server on {redacted(uri)}; Ctrl-C stops it", file=sys.stderr, flush=True)
        _wait(process, base, log)
        _show(experiment.name, addresses, options.browser)
        process.wait()
        raise UserError("the MLflow server has stopped unexpectedly", reason=_last_line(log))


def compare_page(client: MlflowClient, experiment: Experiment) -> str:
    """The UI's page that compares the latest runs of an experiment, as the end of an address."""
    found = client.search_runs([experiment.experiment_id], max_results=_MOST_COMPARED)
    # The parent run of a sweep has no results to compare.
    parents = {run.data.tags.get("mlflow.parentRunId") for run in found}
    runs = [run.info.run_id for run in found if run.info.run_id not in parents]
    if not runs:
        raise UserError("--experiment", experiment.name, reason="has no runs; name another one")
    query = {"runs": runs, "experiments": [experiment.experiment_id]}
    encoded = {name: json.dumps(ids, separators=(",", ":")) for name, ids in query.items()}
    return f"#/compare-runs?{urllib.parse.urlencode(encoded)}&{_TRAINING}"


def table_page(client: MlflowClient, experiment: Experiment) -> str:
    """The UI's page with all runs of an experiment in a table, best first, as the end of an address.

    MLflow keeps the chosen columns as a shared view, which is a tag of the experiment.
    """
    view = {"selectedColumns": _COLUMNS, "orderByKey": "metrics.`val/f1`", "orderByAsc": False}
    client.set_experiment_tag(experiment.experiment_id, f"mlflow.sharedViewState.{_VIEW}", json.dumps(view))
    return f"#/experiments/{experiment.experiment_id}/runs?{_TRAINING}&viewStateShareKey={_VIEW}"


def run_page(client: MlflowClient, experiment: Experiment) -> str:
    """The UI's page of an experiment's latest run, as the end of an address."""
    (latest,) = client.search_runs([experiment.experiment_id], max_results=1)
    return f"#/experiments/{experiment.experiment_id}/runs/{latest.info.run_id}?{_TRAINING}"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("lrsa ui", description="Open the MLflow UI on the recorded runs.", epilog=EPILOG)
    add = parser.add_argument
    store = f"sqlite:///FILE or a server's http(s):// address (default: {default_uri()})"
    add(_STORE, metavar="URI", help=store)
    port = "port on this machine (default: 5000); 0 takes a free one"
    add("--port", type=integer(0, 65535), default=5000, metavar="N", help=port)
    add("--experiment", metavar="NAME", help="experiment to show (default: the one with the latest run)")
    add("--no-browser", dest="browser", action="store_false", help="only print the addresses")
    return parser.parse_args(arguments)


def _free_port(port: int) -> int:
    """The port, after checking that it is free; for 0, any free port."""
    with socket.socket() as probe:
        # As the server does: a port that was in use a minute ago counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"is not free ({error.strerror}); name another one, or 0 for any"
            raise UserError("--port", port, reason=reason) from None
        return int(probe.getsockname()[1])


def _experiment(client: MlflowClient, uri: str, name: str | None) -> Experiment:
    """The experiment of that name, or the one with the latest run."""
    if name is not None:
        return find_experiment(client, name, "--experiment")
    experiments = {found.experiment_id: found for found in client.search_experiments()}
    latest = client.search_runs(list(experiments), order_by=["attributes.start_time DESC"], max_results=1)
    if not latest:
        raise UserError(_STORE, redacted(uri), reason="has no runs yet; `lrsa fit` records one")
    return experiments[latest[0].info.experiment_id]


@contextlib.contextmanager
def _server(uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """An ``mlflow server`` with its log; stopped with all its workers at the end of the block."""
    # With this variable, the server's own clients would ask the server itself. This project needs no workers for jobs.
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # Not as an option: everybody on the machine can see options, and the URI may have a password.
    environment["MLFLOW_BACKEND_STORE_URI"] = uri
    with tempfile.TemporaryFile() as log:
        # In a separate session, so that Ctrl-C reaches only this process, which then stops the server in order.
        process = subprocess.Popen(
            _command(uri, port), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process, log
        finally:
            _stop(process)


def _command(uri: str, port: int) -> list[str]:
    command = [sys.executable, *f"-m mlflow server --host {HOST} --port {port} --workers 1".split()]
    if _has_training_view():
        command += ["--app-name", _APP]
    location = artifact_location(uri)
    return command if location is None else [*command, "--default-artifact-root", location]


def _has_training_view() -> bool:
    """Whether this installation has registered the app; older installations have not."""
    return bool(metadata.entry_points(group="mlflow.app", name=_APP))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server, then kill the rest of its process group, because a worker can outlive its supervisor."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)


def _wait(process: subprocess.Popen[bytes], base: str, log: IO[bytes]) -> None:
    """Wait until the server answers, which takes up to a minute on a slow machine."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if process.poll() is not None:
            raise UserError("the MLflow server did not start", reason=_last_line(log))
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{base}/health", timeout=5):
            return
        if time.monotonic() > deadline:
            raise UserError(f"the MLflow server does not answer after {_START_SECONDS:.0f} s", reason=_last_line(log))
        time.sleep(0.3)


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _show(experiment: str, addresses: Sequence[str], browser: bool) -> None:
    titles = (f"Runs of {experiment!r}, side by side", "In a table", "The latest run")
    print("\n".join(f"{title}:\n{address}" for title, address in zip(titles, addresses, strict=False)), flush=True)
    # Without a display, webbrowser would start a text browser in this terminal.
    if browser and (os.name == "nt" or sys.platform == "darwin" or os.environ.get("DISPLAY")):
        webbrowser.open(addresses[0])
