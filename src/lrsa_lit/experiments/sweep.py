"""A sweep: fits at all points of a grid of settings, each evaluated by its last validation.

The digest of the whole resolved config identifies a finished point. The same command therefore resumes where it was
stopped, even within a point from its last checkpoint, and a larger grid runs only the new points.

No sweeper library is used. Optuna's GridSampler would add a second store of trials to MLflow's, its MLflow callback
would add a second run per fit, and its resuming ignores the fit's other settings. Hydra's sweeper needs hydra's configs
in place of LightningCLI's. Only :func:`itertools.product` would remain of either.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_lit.errors import UserError, printable, redacted
from lrsa_lit.experiments.jobs import Executor, Job, Unit
from lrsa_lit.experiments.parent_run import LOGGER, PARENT, Record, logger_of
from lrsa_lit.experiments.sweep_results import Outcome, Point, as_csv, as_note, best, f1_against_kept
from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.store import answering

if TYPE_CHECKING:
    from mlflow.entities import Run

    from lrsa_lit.experiments.study import FitSettings

FLAG = "--grid"

POINT = "sweep.point"
"""Tag of a child run: the digest of its config."""

_SWEEP = "sweep.key"
"""Tag of a parent run: the digest of its points."""

BEST = "sweep.best"
"""Tag of a parent run: the name of its best child; ``sweep.best_run`` is the child's id."""


class Sweep:
    """The points of a grid (values of each setting) and their results; raises a UserError if the store fails."""

    def __init__(self, points: Sequence[Point], grid: Mapping[str, Sequence[str]]) -> None:
        self._points = points
        self._found: dict[int, Outcome] = {}
        self._failed: list[Point] = []
        key = _digest(" ".join(sorted(point.digest for point in points)))
        name = f"sweep-{'-'.join(setting.rpartition('.')[2] for setting in grid)}"
        self._record = Record(points[0].config["trainer"], _SWEEP, key, name, {"sweep.grid": json.dumps(grid)})

    @property
    def outcomes(self) -> list[Outcome]:
        """Results of all points that are finished, have failed or were stopped, in the order of the points."""
        return [outcome for _, outcome in sorted(self._found.items())]

    def run(self, executor: Executor) -> bool:
        """Fit at all unfinished points, until Ctrl-C; return whether none has failed."""
        with self._record.running(self._failed):
            try:
                executor.drive([self._unit(number) for number in range(len(self._points))], self._record.beat)
            finally:
                self._report()
        return not self._failed

    def _report(self) -> None:
        """Log the table, its plot and the best child to the sweep's own run."""
        if not self.outcomes:
            return
        self._record.text("sweep.csv", as_csv(self.outcomes))
        tags = {"mlflow.note.content": as_note(self.outcomes)}
        if (chosen := best(self.outcomes)) is not None and chosen.run is not None:
            tags |= {BEST: chosen.run.info.run_name, f"{BEST}_run": chosen.run.info.run_id}
        self._record.tag(tags)
        if (figure := f1_against_kept(self.outcomes)) is not None:
            self._record.picture("f1-against-kept", figure)

    def _unit(self, number: int) -> Unit:
        """Fit at one point unless it is finished, and store the result."""
        point = self._points[number]
        label = " ".join(f"{key}={value}" for key, value in point.values.items())
        shown = f"[{number + 1}/{len(self._points)}] {label}"
        runs = self._record.newest_first({POINT: point.digest})
        if (finished := next((run for run in runs if run.info.status == "FINISHED"), None)) is not None:
            print(printable(f"{shown}: finished as {finished.info.run_name}"), flush=True)
            self._found[number] = Outcome(point, "finished before", finished)
            return None

        def command() -> list[str]:
            checkpoint = self._left_behind(point)
            print(printable(f"{shown}{f': resumes from {checkpoint}' if checkpoint else ''}"), flush=True)
            resumed = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
            return ["fit", *point.arguments, *resumed]

        tags = {PARENT: self._record.run_id, POINT: point.digest}
        code = 130
        try:
            code = yield Job(command, tags, {}, point.config["trainer"])
        finally:
            if code:
                self._failed.append(point)
            state = {0: "finished", 130: "stopped"}.get(code, f"failed (exit code {code})")
            self._found[number] = Outcome(point, state, self._ended(tags))
        return None

    def _left_behind(self, point: Point) -> Path | None:
        """The last checkpoint of an unfinished fit of this point; its run becomes a child of this sweep."""
        from lrsa_lit.models.checkpoint_file import damage

        root = Path(point.config["trainer"].get("default_root_dir") or ".", self._record.experiment)
        for run in self._record.newest_first({POINT: point.digest}):
            # Skip damaged checkpoints, which the fit would refuse.
            saved: list[Path] = [path for path in (root / run.info.run_id).rglob("last*.ckpt") if damage(path) is None]
            if saved:
                with answering(self._record.uri):
                    self._record.client.set_tag(run.info.run_id, PARENT, self._record.run_id)
                return max(saved, key=lambda path: path.stat().st_mtime)
        return None

    def _ended(self, tags: Mapping[str, str]) -> Run | None:
        """The run of an ended process; marked as FAILED if the process died before it could close its run."""
        with contextlib.suppress(UserError):
            run = next(iter(self._record.newest_first(tags)), None)
            if run is not None and run.info.status == "RUNNING":
                with answering(self._record.uri):
                    self._record.client.set_tag(run.info.run_id, heartbeat.DIED, "its process ended unexpectedly")
                    self._record.client.set_terminated(run.info.run_id, "FAILED")
            return run
        return None


def parse(axes: Sequence[str]) -> dict[str, list[str]]:
    """Parse the YAML values of each setting from texts such as ``model.lrsa.top_k=16,32``.

    Raises:
        UserError: a text is malformed, or a setting or value appears twice.
    """
    if not axes:
        raise UserError(FLAG, reason="is empty; at least one KEY=VALUE,VALUE is needed")
    grid: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        if key in grid:
            raise UserError(FLAG, key, reason=f"appears twice; give all its values in one {FLAG}")
        if key.startswith("trainer.logger"):
            raise UserError(FLAG, key, reason="is not allowed; all runs of a sweep go to one store and experiment")
        values = _values(key, text)
        # YAML allows a trailing comma, but here it is more likely a forgotten value.
        if not key or not values or text.rstrip().endswith(","):
            raise UserError(FLAG, axis, "KEY=VALUE,VALUE without empty values")
        if doubled := [value for value in values if values.count(value) > 1]:
            raise UserError(FLAG, key, reason=f"has the value {doubled[0]} twice; all values must differ")
        grid[key] = values
    return grid


def points(grid: Mapping[str, Sequence[str]], arguments: Sequence[str], fit_settings: FitSettings) -> list[Point]:
    """All combinations of the settings' values, each parsed as its fit would be.

    Raises:
        UserError: a combination is invalid, or a setting is not allowed in a sweep.
    """
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.checkpoints.resume import files_of

    made = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        own = [*arguments, *(part for key, value in chosen.items() for part in (f"--{key}", value))]
        config = fit_settings.given(own, defaults=True)
        # Making the rule checks bounds that depend on each other.
        fit_settings.made("model.lrsa", LRSAConfig, config["model"]["lrsa"])
        if config.get("ckpt_path"):
            raise UserError("--ckpt_path", reason="it is not allowed in a sweep, whose fits would all resume one run")
        if config.get("estimate"):
            raise UserError("--estimate", reason="it is not allowed in a sweep; lrsa fit estimates one point")
        if run_id := logger_of(config["trainer"]).get("run_id"):
            raise UserError(f"{LOGGER}.run_id", run_id, reason="is not allowed in a sweep; each fit has its own")
        # The digest excludes passwords, which may change, but includes the files that a rule is read from.
        decides = json.dumps(config, sort_keys=True) + "".join(sorted(files_of(config).values()))
        made.append(Point(chosen, own, config, _digest(redacted(decides))))
    return made


def _values(key: str, text: str) -> list[str]:
    """The values of an axis; empty if they cannot be parsed."""
    import yaml

    from lrsa_lit.yaml_file import check_bounds

    check_bounds(f"{FLAG}: {key}", f"[{text}]")
    try:
        return [value if isinstance(value, str) else json.dumps(value) for value in yaml.safe_load(f"[{text}]")]
    except (yaml.YAMLError, TypeError, ValueError):
        # YAML's dates and sets are not JSON, and no setting takes them.
        return []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
