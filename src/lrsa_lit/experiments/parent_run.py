"""The MLflow run of a sweep or a study, whose children are the runs of its commands."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, redacted, under
from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.store import answering, checked_uri, connect, existing_uri, experiment_id

if TYPE_CHECKING:
    from mlflow.entities import Run

LOGGER = "trainer.logger.init_args"
"""The settings that name the store of a command's runs."""

PARENT = "mlflow.parentRunId"
STUDY = "study"
"""Tag of a study's run: the study's title."""


@dataclass
class Ending:
    """How a sweep or study ends.

    Attributes:
        well: whether nothing has failed.
    """

    well: bool = True


class Record:
    """A run of the store that the commands record to.

    Args:
        trainer: the trainer's settings of a command, whose logger is MLflowRun.
        key: name of the tag that tells one sweep or study from the others.
        value: its value; the run that has it already is gone on with.

    Raises:
        UserError: the logger is another one, or its store does not answer.
    """

    def __init__(self, trainer: Mapping[str, Any], key: str, value: str, name: str, tags: Mapping[str, str]) -> None:
        logger = logger_of(trainer)
        with under(LOGGER):
            self.uri = checked_uri(logger["tracking_uri"])
            self.client = connect(self.uri)
        with under(LOGGER), answering(self.uri):
            self.experiment = experiment_id(
                self.client, logger["experiment_name"], self.uri, logger.get("experiment_id")
            )
            if (before := self.latest({key: value})) is not None:
                self.run_id = str(before.info.run_id)
            else:
                tags = {**tags, key: value} | heartbeat.tags()
                self.run_id = str(self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id)
        self.beat()

    @contextlib.contextmanager
    def running(self) -> Iterator[Ending]:
        """Close the run behind a block, by how that has ended."""
        ending, status = Ending(), "FAILED"
        try:
            yield ending
            status = "FINISHED" if ending.well else "FAILED"
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

    def latest(self, tags: Mapping[str, str], status: str | None = None) -> Run | None:
        """The run that was begun last of those with some tags."""
        return next(iter(self.latest_first(tags, status)), None)

    def latest_first(self, tags: Mapping[str, str], status: str | None = None) -> list[Run]:
        """The runs with some tags."""
        conditions = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
        conditions += [f"attributes.status = '{status}'"] * (status is not None)
        order = ["attributes.start_time DESC"]
        with answering(self.uri):
            return list(self.client.search_runs([self.experiment], " AND ".join(conditions), order_by=order))

    def keep(self, path: Path) -> None:
        """Put a file into the run; a store that does not answer misses it."""
        with contextlib.suppress(UserError), answering(self.uri):
            self.client.log_artifact(self.run_id, str(path))


def results_in(uri: str, study: str, folder: Path) -> Path:
    """The lines of results that the last run of a study has put into a store.

    Args:
        uri: of the store.
        study: its title.
        folder: where to put the file.

    Raises:
        UserError: the store has none, or does not answer.
    """
    uri = existing_uri(uri, "results")
    client = connect(uri, "results")
    with answering(uri, "results"):
        experiments = [found.experiment_id for found in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.`{STUDY}` = '{study}'", order_by=["attributes.start_time DESC"])
        for run in runs:
            for item in client.list_artifacts(run.info.run_id):
                if item.path.endswith(".jsonl"):
                    return Path(client.download_artifacts(run.info.run_id, item.path, str(folder)))
    raise UserError("results", redacted(uri), reason=f"has no results of the study {study}")


def logger_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer's logger.

    Raises:
        UserError: it is not MLflowRun.
    """
    logger = trainer.get("logger")
    settings: dict[str, Any] = (logger.get("init_args") or {}) if isinstance(logger, dict) else {}
    if "experiment_name" not in settings or "tracking_uri" not in settings:
        raise UserError("trainer.logger", reason=f"{json.dumps(logger)} is not allowed here", allowed="MLflowRun")
    return settings
