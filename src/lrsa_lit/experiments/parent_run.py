"""The MLflow run of a sweep or a study, whose children are the runs of its commands."""

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
"""The settings that name the store of a command's runs."""

PARENT = "mlflow.parentRunId"
STUDY = "study"
"""Tag of a study's run: the study's title."""

_NEWEST = ["attributes.start_time DESC"]


class Record:
    """A run of the store that the commands record to.

    Args:
        trainer: the trainer's settings of a command, whose logger is MLflowRun.
        key: name of the tag that tells one sweep or study from the others.
        value: its value; the run that has it already is gone on with.
        name: of a new run, as are the further ``tags``.

    Raises:
        UserError: the logger is another one, or its store does not answer.
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
        """Close the run behind a block, by how that has ended and whether anything has failed."""
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
        """Say that the run lives; a store that does not answer misses it."""
        with contextlib.suppress(UserError), answering(self.uri):
            heartbeat.beat(self.client, self.run_id)

    def newest_first(self, tags: Mapping[str, str]) -> list[Run]:
        """The runs with some tags."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        with answering(self.uri):
            return list(self.client.search_runs([self.experiment], " AND ".join(conditions), order_by=_NEWEST))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a store that does not answer misses them."""
        with contextlib.suppress(UserError), answering(self.uri):
            for name, value in tags.items():
                self.client.set_tag(self.run_id, name, value)

    def text(self, name: str, text: str) -> None:
        """Make a text an artifact of the run, in place of the one before; a store that does not answer misses it."""
        with contextlib.suppress(UserError), answering(self.uri):
            self.client.log_text(self.run_id, text, name)

    def picture(self, name: str, figure: Figure) -> None:
        """The same with a figure, ``pictures/NAME.png``."""
        with contextlib.suppress(UserError), answering(self.uri):
            self.client.log_figure(self.run_id, figure, f"{PICTURES}/{name}.png")

    def keep(self, path: Path) -> None:
        """Put a file, if there is one, into the run; a store that does not answer misses it."""
        with contextlib.suppress(UserError), answering(self.uri):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))


def results_in(uri: str, study: str, folder: Path) -> Path:
    """A file in a folder, with the results of a study's last run in a store; a UserError where there are none."""
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
    """The settings of a trainer's MLflowRun, alone or among other loggers; a UserError if there is none."""
    logger = trainer.get("logger")
    for each in logger if isinstance(logger, list) else [logger]:
        settings: dict[str, Any] = (each.get("init_args") or {}) if isinstance(each, dict) else {}
        if "experiment_name" in settings and "tracking_uri" in settings:
            return settings
    raise UserError("trainer.logger", reason=f"{json.dumps(logger)} is not allowed here", allowed="MLflowRun")
