"""``lrsa sweep``: run the points of a grid one after the other, again and again until all are done.

A point is a ``lrsa fit`` in a process of its own, so that one that fails, or runs out of memory, leaves the others
alone. Its MLflow run is a child of the sweep's. What is finished is told by the digest of the whole resolved config, so
that the same command goes on where it was stopped, within a point from its last checkpoint, and a larger grid runs only
what is new.

No sweeper library is used. Optuna's GridSampler would add its own store of trials beside MLflow's, its MLflow callback
a second run for each fit that has one already, and its resuming knows nothing of the fit's other settings; hydra's
sweeper needs hydra's configs in place of LightningCLI's. What would remain of either is :func:`itertools.product`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lrsa_lit.cli.arguments import Parser, terminable
from lrsa_lit.errors import UserError, printable
from lrsa_lit.sweep.grid import FLAG, Point, parse, points
from lrsa_lit.sweep.summary import Outcome, show
from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.store import URI_KEY, answering, checked_uri, connect, experiment_id

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PARENT = "mlflow.parentRunId"
POINT = "sweep.point"
"""Tag of a child: the digest of its config."""

SWEEP = "sweep.key"
"""Tag of a parent: the digest of its points."""

_CONTEXT = "MLFLOW_RUN_CONTEXT"
_STOP_SECONDS = 120.0
"""How long a stopped fit may take to save its checkpoint."""

EPILOG = f"""\
All other options are those of `lrsa fit`. Values are YAML, so {FLAG} 'data.init_args.limit={{train: 8}},{{train: 64}}'
has two. The same command again runs what is not finished yet, from its last checkpoint.

example:
  lrsa sweep --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml \\
             {FLAG} model.lrsa.top_k=16,32,64 {FLAG} model.lrsa.lag_size=128,256
"""


class _Store(NamedTuple):
    """Where a sweep is recorded."""

    client: MlflowClient
    uri: str
    experiment: str


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: what follows ``lrsa sweep``.

    Raises:
        UserError: a mistake in the arguments, before anything has run.
        SystemExit: code 1 if a point failed, 130 after Ctrl-C.
    """
    options, rest = _parse(arguments)
    grid = parse(options.grid)
    todo = points(grid, rest)
    _check_fits(todo)
    store = _open(todo[0])
    with answering(store.uri):
        parent = _parent(store, todo, grid)
    outcomes: list[Outcome] = []
    status = "FAILED"
    try:
        with terminable():
            for number, point in enumerate(todo, start=1):
                _run_point(store, parent, point, f"{number}/{len(todo)}", outcomes)
        failed = any(outcome.failed for outcome in outcomes)
        status = "FAILED" if failed else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        print("\nlrsa: interrupted; the same command goes on with what is not finished", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        with contextlib.suppress(UserError), answering(store.uri):
            store.client.set_terminated(parent, status)
        show(outcomes, len(todo))
    if failed:
        raise SystemExit(1)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("lrsa sweep", description="Fit once for each point of a grid of settings.", epilog=EPILOG)
    parser.add_argument(
        FLAG, metavar="KEY=V1,V2", action="append", default=[], help="values of a setting; several span a grid"
    )
    options, rest = parser.parse_known_args(arguments)
    if printing := [option for option in rest if option.startswith("--print_")]:
        raise UserError(f"{printing[0]}: it is not allowed in a sweep; lrsa fit has it")
    return options, rest


def _check_fits(todo: Sequence[Point]) -> None:
    """Refuse, wherever it is set, what leaves a sweep without fits of its own."""
    if any(point.config.get("ckpt_path") for point in todo):
        raise UserError("--ckpt_path: it is not allowed in a sweep, whose fits would all resume the same run")
    if any(point.config.get("estimate") for point in todo):
        raise UserError("--estimate: it is not allowed in a sweep; lrsa fit estimates one point")
    if run_id := _logger(todo[0]).get("run_id"):
        raise UserError(
            f"{URI_KEY.rpartition('.')[0]}.run_id: {run_id} is not allowed in a sweep; each fit has its own"
        )


def _open(point: Point) -> _Store:
    """The store and experiment that the fits record to."""
    settings = _logger(point)
    uri = checked_uri(settings["tracking_uri"])
    client = connect(uri)
    with answering(uri):
        named = settings.get("experiment_id")
        return _Store(client, uri, experiment_id(client, settings["experiment_name"], uri, named))


def _logger(point: Point) -> dict[str, Any]:
    """The settings of a fit's logger."""
    logger = point.config["trainer"].get("logger")
    settings: dict[str, Any] = (logger.get("init_args") or {}) if isinstance(logger, dict) else {}
    if "experiment_name" not in settings or "tracking_uri" not in settings:
        raise UserError(f"trainer.logger: {json.dumps(logger)} is not allowed in a sweep; it must be MLflowRun")
    return settings


def _parent(store: _Store, todo: Sequence[Point], grid: dict[str, list[str]]) -> str:
    """The sweep's run, the one of the last time if these are its points."""
    key = hashlib.sha256(" ".join(sorted(point.digest for point in todo)).encode()).hexdigest()[:16]
    if (before := _latest(store, {SWEEP: key})) is not None:
        parent = str(before.info.run_id)
    else:
        tags = {SWEEP: key, "sweep.grid": json.dumps(grid)} | heartbeat.tags()
        name = f"sweep-{'-'.join(setting.rpartition('.')[2] for setting in grid)}"
        parent = str(store.client.create_run(store.experiment, tags=tags, run_name=name).info.run_id)
    heartbeat.beat(store.client, parent)
    return parent


def _run_point(store: _Store, parent: str, point: Point, number: str, outcomes: list[Outcome]) -> None:
    """Fit at one point unless that is done, and add what came of it."""
    with answering(store.uri):
        finished = _latest(store, {POINT: point.digest}, "FINISHED")
    if finished is not None:
        print(printable(f"[{number}] {point.label}: finished as {finished.info.run_name}"), flush=True)
        outcomes.append(Outcome(point, "finished before", finished))
        return
    with answering(store.uri):
        checkpoint = _left_behind(store, parent, point)
    from_there = f": goes on from {checkpoint}" if checkpoint else ""
    print(printable(f"[{number}] {point.label}{from_there}"), flush=True)

    def beat() -> None:
        with contextlib.suppress(UserError), answering(store.uri):
            heartbeat.beat(store.client, parent)

    code = 130
    try:
        code = _fit(point, checkpoint, parent, beat)
    finally:
        own = None
        with contextlib.suppress(UserError), answering(store.uri):
            own = _ended(store, _latest(store, {POINT: point.digest, PARENT: parent}))
        state = {0: "finished", 130: "stopped"}.get(code, f"failed (exit code {code})")
        outcomes.append(Outcome(point, state, own, failed=code != 0))


def _fit(point: Point, checkpoint: Path | None, parent: str, beat: Callable[[], None]) -> int:
    """Run a fit and return its exit code; Ctrl-C stops it in order first."""
    # MLflow adds these tags to the runs of the process; the fit's own config stays what it is.
    tags = json.loads(os.environ.get(_CONTEXT) or "{}") | {PARENT: parent, POINT: point.digest}
    process = subprocess.Popen(
        _command(point, checkpoint),
        env=os.environ | {_CONTEXT: json.dumps(tags)},
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches this process alone, which hands it on: once.
        process_group=0,
    )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(heartbeat.EVERY)
            beat()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise


def _command(point: Point, checkpoint: Path | None) -> list[str]:
    resumed = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    return [sys.executable, "-m", "lrsa_lit.cli", "fit", *point.arguments, *resumed]


def _left_behind(store: _Store, parent: str, point: Point) -> Path | None:
    """The last checkpoint of a fit of this point that did not finish; its run becomes this sweep's."""
    from lrsa_lit.models.checkpoint_file import damage

    root = Path(point.config["trainer"].get("default_root_dir") or ".", store.experiment)
    query = f"tags.`{POINT}` = '{point.digest}'"
    for run in store.client.search_runs([store.experiment], query, order_by=["attributes.start_time DESC"]):
        # The fit would refuse a damaged one each time.
        saved: list[Path] = [path for path in (root / run.info.run_id).rglob("last*.ckpt") if damage(path) is None]
        if saved:
            store.client.set_tag(run.info.run_id, PARENT, parent)
            return max(saved, key=lambda path: path.stat().st_mtime)
    return None


def _latest(store: _Store, tags: dict[str, str], status: str | None = None) -> Run | None:
    conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    conditions += [f"attributes.status = '{status}'"] * (status is not None)
    query = " AND ".join(conditions)
    found = store.client.search_runs([store.experiment], query, order_by=["attributes.start_time DESC"], max_results=1)
    return found[0] if found else None


def _ended(store: _Store, run: Run | None) -> Run | None:
    """The run of a process that has ended, closed if that was so sudden that it could not do so itself."""
    if run is not None and run.info.status == "RUNNING":
        store.client.set_tag(run.info.run_id, heartbeat.DIED, "its process ended without a word")
        store.client.set_terminated(run.info.run_id, "FAILED")
    return run
