"""What a store says of the run that wrote a checkpoint, and of evaluations of it: data and scores."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from lrsa_lit.tracking.store import answering, connect, find_run

if TYPE_CHECKING:
    from mlflow.entities import Run

_SCORE = re.compile(r"(?:val|test)/(?:[^/]+/)?(?:f1|em|loss)|eval/.+(?<!_stderr)")
_STDERR = re.compile(r"_stderr(?=/|$)")


class Score(NamedTuple):
    """A score of a checkpoint.

    Attributes:
        name: as in the store: split, attention if it is not the run's own, and measure.
        value: the last one.
        run: what the run that found it is called.
        rule: the attention of that run, in a word.
    """

    name: str
    value: float
    run: str
    rule: str


class RunFacts(NamedTuple):
    """What is known of a run.

    Attributes:
        name: of the run.
        run_id: its id.
        data: for each data set its name with the split, its digest, and how many examples were kept, as JSON.
        scores: those of the run's last validation, and of later evaluations of its checkpoints.
        commit: of this project's code.
    """

    name: str
    run_id: str
    data: list[tuple[str, str, str]]
    scores: list[Score]
    commit: str | None


def run_facts(uri: str, run_id: str, key: str) -> RunFacts | None:
    """What a store has of a run; None if it has no such run.

    Raises:
        UserError: the store does not answer, or the run was deleted; the error names ``key``.
    """
    client = connect(uri, key)
    with answering(uri, key):
        run = find_run(client, run_id, uri, key)
        if run is None:
            return None
        experiments = [found.experiment_id for found in client.search_experiments()]
        later = client.search_runs(experiments, f"tags.`checkpoint.run` = '{run_id}'")
        scores = [score for each in (run, *reversed(later)) for score in _scores(each)]
    inputs = [item.dataset for item in run.inputs.dataset_inputs] if run.inputs else []
    data = [(each.name, each.digest, each.profile or "") for each in inputs]
    return RunFacts(run.info.run_name, run_id, data, scores, run.data.tags.get("git_commit"))


def _scores(run: Run) -> list[Score]:
    found = run.data.metrics.items()
    name, rule = run.info.run_name, run.data.tags.get("rule", "")
    return [
        Score(metric, value, name, rule)
        for metric, value in sorted(found)
        if _SCORE.fullmatch(metric) and not _STDERR.search(metric)
    ]
