"""The parent MLflow run of a sweep or study; the runs of its commands are the children."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, redacted, under
from lrsa_lit.run_labels import PICTURES
from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.store import answering, checked_uri, connect, existing_uri, experiment_id

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run

LOGGER = "trainer.logger.init_args"
"""Settings key of the MLflow logger, which names the store of a command's runs."""

PARENT = "mlflow.parentRunId"
STUDY = "study"
"""Tag of a study's run; its value is the study's title."""

_NEWEST = ["attributes.start_time DESC"]


class Record:
    """A parent run in the store of the commands' runs.

    Args:
        trainer: trainer settings of a command, whose logger must be MLflowRun.
        key: name of the tag that identifies the sweep or study.
        value: value of this tag; a run that already has it is continued.
        name: name of a new run.
        tags: further tags of a new run.

    Raises:
        UserError: the logger is not MLflowRun, or its store does not answer.
    """

    def __init__(self, trainer: Mapping[str, Any], key: str, value: str, name: str, tags: Mapping[str, str]) -> None:
        logger = logger_of(trainer)
        with under(LOGGER):
            self.uri = checked_uri(logger["tracking_uri"])
            self.client = connect(self.uri)
            with answering(self.uri):
                named = logger["experiment_name"], self.uri, logger.get("experiment_id")
                self.experiment = experiment_id(self.client, *named)
                if found := self.newest_first({key: value}):
                    self.run_id = str(found[0].info.run_id)
                else:
                    tags = {**tags, key: value} | heartbeat.tags()
                    self.run_id = str(self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id)
        self.beat()

    @contextlib.contextmanager
    def running(self, failed: Sized) -> Iterator[None]:
        """Close the run after a block, with a status that reflects how it ended and whether ``failed`` is empty."""
        status = "FAILED"
        try:
            yield
            status = "FAILED" if failed else "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            with contextlib.suppress(UserError), answering(self.uri):
                self.client.set_terminated(self.run_id, status)

    def beat(self) -> None:
        """Record a heartbeat of the run; ignored if the store does not answer."""
        with contextlib.suppress(UserError), answering(self.uri):
            heartbeat.beat(self.client, self.run_id)

    def newest_first(self, tags: Mapping[str, str]) -> list[Run]:
        """The runs that have these tags, newest first."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        with answering(self.uri):
            return list(self.client.search_runs([self.experiment], " AND ".join(conditions), order_by=_NEWEST))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; ignored if the store does not answer."""
        with contextlib.suppress(UserError), answering(self.uri):
            for name, value in tags.items():
                self.client.set_tag(self.run_id, name, value)

    def text(self, name: str, text: str) -> None:
        """Save a text as an artifact of the run, replacing an earlier one; ignored if the store does not answer."""
        with contextlib.suppress(UserError), answering(self.uri):
            self.client.log_text(self.run_id, text, name)

    def picture(self, name: str, figure: Figure) -> None:
        """Save a figure as the artifact ``pictures/NAME.png``; ignored if the store does not answer."""
        with contextlib.suppress(UserError), answering(self.uri):
            self.client.log_figure(self.run_id, figure, f"{PICTURES}/{name}.png")

    def keep(self, path: Path) -> None:
        """Save a file as an artifact of the run if it exists; ignored if the store does not answer."""
        with contextlib.suppress(UserError), answering(self.uri):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))


def results_in(uri: str, study: str, folder: Path) -> Path:
    """Download the results of a study's latest run from a store into a folder, and return the file.

    Raises:
        UserError: the store does not answer, or it has no results of the study.
    """
    uri = existing_uri(uri, "results")
    client = connect(uri, "results")
    with answering(uri, "results"):
        experiments = [found.experiment_id for found in client.search_experiments()]
        for run in client.search_runs(experiments, f"tags.`{STUDY}` = '{study}'", order_by=_NEWEST):
            for item in client.list_artifacts(run.info.run_id):
                if item.path.endswith(".jsonl"):
                    return Path(client.download_artifacts(run.info.run_id, item.path, str(folder)))
    raise UserError("results", redacted(uri), reason=f"has no results of the study {study}")


def logger_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer's MLflowRun, alone or among other loggers; raises a UserError if there is none."""
    logger = trainer.get("logger")
    for each in logger if isinstance(logger, list) else [logger]:
        settings: dict[str, Any] = (each.get("init_args") or {}) if isinstance(each, dict) else {}
        if "experiment_name" in settings and "tracking_uri" in settings:
            return settings
    raise UserError("trainer.logger", reason=f"{json.dumps(logger)} is not allowed here", allowed="MLflowRun")
