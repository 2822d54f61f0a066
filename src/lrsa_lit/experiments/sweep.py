"""A sweep: fits at the points of a grid of settings, each evaluated by its last validation.

What is finished is told by the digest of the whole resolved config, so that the same command goes on where it was
stopped, within a point from its last checkpoint, and a larger grid runs only what is new.

No sweeper library is used. Optuna's GridSampler would add its own store of trials beside MLflow's, its MLflow callback
a second run for each fit that has one already, and its resuming knows nothing of the fit's other settings; hydra's
sweeper needs hydra's configs in place of LightningCLI's. What would remain of either is :func:`itertools.product`.
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
"""Tag of a child: the digest of its config."""

_SWEEP = "sweep.key"
"""Tag of a parent: the digest of its points."""

BEST = "sweep.best"
"""Tag of a parent: the name of its best child; with ``_run`` behind it, that one's id."""


class Sweep:
    """The points of a grid (values of each setting), and what came of them; a UserError without their store."""

    def __init__(self, points: Sequence[Point], grid: Mapping[str, Sequence[str]]) -> None:
        self._points = points
        self._found: dict[int, Outcome] = {}
        self._failed: list[Point] = []
        key = _digest(" ".join(sorted(point.digest for point in points)))
        name = f"sweep-{'-'.join(setting.rpartition('.')[2] for setting in grid)}"
        self._record = Record(points[0].config["trainer"], _SWEEP, key, name, {"sweep.grid": json.dumps(grid)})

    @property
    def outcomes(self) -> list[Outcome]:
        """Of the points that were finished before, have ended or were stopped, in the order of the points."""
        return [outcome for _, outcome in sorted(self._found.items())]

    def run(self, executor: Executor) -> bool:
        """Fit at all points that are not finished, until Ctrl-C; returns whether none has failed."""
        with self._record.running(self._failed):
            try:
                executor.drive([self._unit(number) for number in range(len(self._points))], self._record.beat)
            finally:
                self._report()
        return not self._failed

    def _report(self) -> None:
        """Put the table, its picture and the best child into the sweep's own run."""
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
        """Fit at one point unless that is done, and keep what came of it."""
        point = self._points[number]
        label = " ".join(f"{key}={value}" for key, value in point.values.items())
        shown = f"[{number + 1}/{len(self._points)}] {label}"
        runs = self._record.newest_first({POINT: point.digest})
        if (finished := next((run for run in runs if run.info.status == "FINISHED"), None)) is not None:
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
            if code:
                self._failed.append(point)
            state = {0: "finished", 130: "stopped"}.get(code, f"failed (exit code {code})")
            self._found[number] = Outcome(point, state, self._ended(tags))

    def _left_behind(self, point: Point) -> Path | None:
        """The last checkpoint of a fit of this point that did not finish; its run becomes this sweep's."""
        from lrsa_lit.models.checkpoint_file import damage

        root = Path(point.config["trainer"].get("default_root_dir") or ".", self._record.experiment)
        for run in self._record.newest_first({POINT: point.digest}):
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
            run = next(iter(self._record.newest_first(tags)), None)
            if run is not None and run.info.status == "RUNNING":
                with answering(self._record.uri):
                    self._record.client.set_tag(run.info.run_id, heartbeat.DIED, "its process ended without a word")
                    self._record.client.set_terminated(run.info.run_id, "FAILED")
            return run
        return None


def parse(axes: Sequence[str]) -> dict[str, list[str]]:
    """The YAML values of each setting, from texts such as ``model.lrsa.top_k=16,32``, or a UserError."""
    if not axes:
        raise UserError(FLAG, reason="none is given; at least one KEY=VALUE,VALUE is needed")
    grid: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        if key in grid:
            raise UserError(FLAG, key, reason=f"stands twice; give all its values in one {FLAG}")
        if key.startswith("trainer.logger"):
            raise UserError(FLAG, key, reason="is not allowed; the runs of a sweep stand in one store and experiment")
        values = _values(key, text)
        # YAML allows a comma at the end, which rather is a value that was forgotten.
        if not key or not values or text.rstrip().endswith(","):
            raise UserError(FLAG, axis, "KEY=VALUE,VALUE without empty values")
        if doubled := [value for value in values if values.count(value) > 1]:
            raise UserError(FLAG, key, reason=f"has the value {doubled[0]} twice; each must be another one")
        grid[key] = values
    return grid


def points(grid: Mapping[str, Sequence[str]], arguments: Sequence[str], fit_settings: FitSettings) -> list[Point]:
    """All combinations of the settings' values, each parsed as its fit would be, or refused by a UserError."""
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.checkpoints.resume import files_of

    made = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        own = [*arguments, *(part for key, value in chosen.items() for part in (f"--{key}", value))]
        config = fit_settings.given(own, defaults=True)
        # The bounds that depend on each other are the rule's own to check.
        fit_settings.made("model.lrsa", LRSAConfig, config["model"]["lrsa"])
        if config.get("ckpt_path"):
            raise UserError("--ckpt_path", reason="it is not allowed in a sweep, whose fits would all resume one run")
        if config.get("estimate"):
            raise UserError("--estimate", reason="it is not allowed in a sweep; lrsa fit estimates one point")
        if run_id := logger_of(config["trainer"]).get("run_id"):
            raise UserError(f"{LOGGER}.run_id", run_id, reason="is not allowed in a sweep; each fit has its own")
        # Not of a password, which may be another one next time; but of what a rule is read from.
        decides = json.dumps(config, sort_keys=True) + "".join(sorted(files_of(config).values()))
        made.append(Point(chosen, own, config, _digest(redacted(decides))))
    return made


def _values(key: str, text: str) -> list[str]:
    """The values of an axis; none where they cannot be read."""
    import yaml

    from lrsa_lit.yaml_file import check_bounds

    check_bounds(f"{FLAG}: {key}", f"[{text}]")
    try:
        return [value if isinstance(value, str) else json.dumps(value) for value in yaml.safe_load(f"[{text}]")]
    except (yaml.YAMLError, TypeError, ValueError):
        # JSON has neither dates nor sets, which are no settings either.
        return []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
