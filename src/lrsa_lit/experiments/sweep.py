"""A sweep: a study whose rows are the points of a grid, each evaluated by the last validation of its fit.

What is finished is told by the digest of the whole resolved config, so that the same command goes on where it was
stopped, within a point from its last checkpoint, and a larger grid runs only what is new.

No sweeper library is used. Optuna's GridSampler would add its own store of trials beside MLflow's, its MLflow callback
a second run for each fit that has one already, and its resuming knows nothing of the fit's other settings; hydra's
sweeper needs hydra's configs in place of LightningCLI's. What would remain of either is :func:`itertools.product`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_lit.errors import UserError, printable
from lrsa_lit.experiments.jobs import Executor, Job, Unit
from lrsa_lit.experiments.parent_run import LOGGER, PARENT, Record, logger_of
from lrsa_lit.experiments.settings_grid import Point
from lrsa_lit.experiments.summary import Outcome
from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.store import answering

if TYPE_CHECKING:
    from mlflow.entities import Run

POINT = "sweep.point"
"""Tag of a child: the digest of its config."""

SWEEP = "sweep.key"
"""Tag of a parent: the digest of its points."""


class Sweep:
    """The points of a grid, and what came of them.

    Args:
        points: what is to be fitted.
        grid: values of each setting.

    Attributes:
        outcomes: of the points that were finished before, have ended or were stopped, in the order of the points.

    Raises:
        UserError: a point's fit would not be one of its own, or its store does not answer.
    """

    def __init__(self, points: Sequence[Point], grid: Mapping[str, Sequence[str]]) -> None:
        _check_fits(points)
        self._points = points
        self._found: dict[int, Outcome] = {}
        key = hashlib.sha256(" ".join(sorted(point.digest for point in points)).encode()).hexdigest()[:16]
        name = f"sweep-{'-'.join(setting.rpartition('.')[2] for setting in grid)}"
        self._record = Record(points[0].config["trainer"], SWEEP, key, name, {"sweep.grid": json.dumps(grid)})

    @property
    def outcomes(self) -> list[Outcome]:
        """In the order of the points."""
        return [outcome for _, outcome in sorted(self._found.items())]

    def run(self, executor: Executor) -> bool:
        """Fit at all points that are not finished; returns whether none has failed.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        with self._record.running() as ended:
            executor.drive([self._unit(number) for number in range(len(self._points))], self._record.beat)
            ended.well = not any(outcome.failed for outcome in self.outcomes)
        return ended.well

    def _unit(self, number: int) -> Unit:
        """Fit at one point unless that is done, and keep what came of it."""
        point = self._points[number]
        shown = f"[{number + 1}/{len(self._points)}] {point.label}"
        if (finished := self._record.latest({POINT: point.digest}, "FINISHED")) is not None:
            print(printable(f"{shown}: finished as {finished.info.run_name}"), flush=True)
            self._found[number] = Outcome(point, "finished before", finished)
            return

        def command() -> list[str]:
            checkpoint = self._left_behind(point)
            print(printable(f"{shown}{f': goes on from {checkpoint}' if checkpoint else ''}"), flush=True)
            resumed = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
            return ["fit", *point.arguments, *resumed]

        tags = {PARENT: self._record.run_id, POINT: point.digest}
        code = 130
        try:
            code = yield Job(command, tags, {}, point.config["trainer"])
        finally:
            state = {0: "finished", 130: "stopped"}.get(code, f"failed (exit code {code})")
            self._found[number] = Outcome(point, state, self._ended(tags), failed=code != 0)

    def _left_behind(self, point: Point) -> Path | None:
        """The last checkpoint of a fit of this point that did not finish; its run becomes this sweep's."""
        from lrsa_lit.models.checkpoint_file import damage

        root = Path(point.config["trainer"].get("default_root_dir") or ".", self._record.experiment)
        for run in self._record.latest_first({POINT: point.digest}):
            # The fit would refuse a damaged one each time.
            saved: list[Path] = [path for path in (root / run.info.run_id).rglob("last*.ckpt") if damage(path) is None]
            if saved:
                with answering(self._record.uri):
                    self._record.client.set_tag(run.info.run_id, PARENT, self._record.run_id)
                return max(saved, key=lambda path: path.stat().st_mtime)
        return None

    def _ended(self, tags: Mapping[str, str]) -> Run | None:
        """The run of a process that has ended, closed if that was so sudden that it could not do so itself."""
        with contextlib.suppress(UserError):
            run = self._record.latest(tags)
            if run is not None and run.info.status == "RUNNING":
                with answering(self._record.uri):
                    self._record.client.set_tag(run.info.run_id, heartbeat.DIED, "its process ended without a word")
                    self._record.client.set_terminated(run.info.run_id, "FAILED")
            return run
        return None


def _check_fits(points: Sequence[Point]) -> None:
    """Refuse, wherever it is set, what leaves a sweep without fits of its own."""
    if any(point.config.get("ckpt_path") for point in points):
        raise UserError("--ckpt_path", reason="it is not allowed in a sweep, whose fits would all resume the same run")
    if any(point.config.get("estimate") for point in points):
        raise UserError("--estimate", reason="it is not allowed in a sweep; lrsa fit estimates one point")
    if run_id := logger_of(points[0].config["trainer"]).get("run_id"):
        raise UserError(f"{LOGGER}.run_id", run_id, reason="is not allowed in a sweep; each fit has its own")
