"""An evaluation by other means than the Trainer as an MLflow run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lrsa_lit.tracking.machine import git, versions
from lrsa_lit.tracking.store import answering, connect, experiment_id

_LONGEST = 6000
"""Characters of a param that MLflow keeps."""


@dataclass(frozen=True)
class EvaluationRun:
    """What is recorded of an evaluation.

    Attributes:
        name: of the run.
        params: what was asked for.
        metrics: scores by names that the UI groups by their first part.
        tags: besides versions and the commit of this project.
        folder: its files are the run's artifacts; None for none.
        packages: whose versions are tags.
    """

    name: str
    params: Mapping[str, object]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    folder: Path | None = None
    packages: tuple[str, ...] = field(default=("lrsa-lit", "torch", "transformers"))

    def record(self, uri: str, experiment: str | None) -> str:
        """Write the run, whole, into a store; returns its id.

        Raises:
            UserError: the store does not answer, or the experiment was deleted.
        """
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.utils.time import get_current_time_millis

        found = {f"version.{name}": version for name, version in versions(*self.packages).items() if version}
        if (commit := git("rev-parse", "HEAD")) is not None:
            found["git_commit"] = commit
        client = connect(uri)
        with answering(uri):
            run_id = str(client.create_run(experiment_id(client, experiment, uri), run_name=self.name).info.run_id)
            now = get_current_time_millis()
            client.log_batch(
                run_id,
                metrics=[Metric(name, value, now, 0) for name, value in self.metrics.items()],
                params=[Param(name, str(value)[:_LONGEST]) for name, value in self.params.items()],
                tags=[RunTag(name, value) for name, value in {**found, **self.tags}.items()],
            )
            if self.folder is not None:
                client.log_artifacts(run_id, str(self.folder))
            client.set_terminated(run_id)
        return run_id
