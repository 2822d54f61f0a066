"""MLflow runs for analysis: tables of settings and results, selections, and answers to single questions.

Dimensions: R runs that differ only in their seed, Q questions.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lrsa_lit.analysis.record import SelectionRecord
from lrsa_lit.errors import UserError, printable, redacted
from lrsa_lit.evaluation import statistics
from lrsa_lit.paths import nearest
from lrsa_lit.run_labels import ANSWERS, OWN, QUESTIONS, title_of_run
from lrsa_lit.tracking.store import connect, existing_uri, find_experiment
from lrsa_lit.uris import SQLITE, sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

SELECTIONS = "selections"
"""Folder of a run's artifacts that holds its selection records."""

MEASURES = {
    "f1": "val/f1",
    "em": "val/em",
    "loss": "val/loss",
    "step_seconds": "perf/step_seconds",
    "peak_memory_gib": "perf/peak_memory_gib",
}
"""Columns of a table of runs, with their metrics."""

RULE = ["model", "lag_size", "top_k"]
"""Runs with equal values in these columns are repetitions of each other."""

DEFAULT = Path("runs/mlflow.db")
"""Path of the default store, relative to the current folder or one of its parents."""

_ADVICE = "train with --config configs/experiment/selections.yaml"


def open_store(uri: str | None = None) -> MlflowClient:
    """Open the store of the runs, and print which one it is.

    The default is MLFLOW_TRACKING_URI, or else ``runs/mlflow.db`` in the current folder or one of its parents.

    Raises:
        UserError: the store does not exist, is empty, or does not answer.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        here, found = Path.cwd(), nearest(DEFAULT)
        if not found.is_file():
            reason = f"no {DEFAULT} in {here} or above; record a run first, or set MLFLOW_TRACKING_URI"
            raise UserError("tracking_uri", reason=reason)
        uri = sqlite_uri(found, "tracking_uri")
    uri = existing_uri(uri, "tracking_uri")
    named = str(sqlite_path(uri, "tracking_uri")) if uri.startswith(SQLITE) else redacted(uri)
    print(printable(f"Runs of {named}"), file=sys.stderr)
    with warnings.catch_warnings():
        # tqdm warns in notebooks without ipywidgets.
        warnings.filterwarnings("ignore", message="IProgress not found")
        return connect(uri, "tracking_uri")


def latest_experiment(store: MlflowClient, *, with_selections: bool = False) -> str:
    """The experiment of the latest run that was validated, or that recorded selections; prints the others.

    Raises:
        UserError: the store has no such run.
    """
    names: dict[str, str] = {found.experiment_id: found.name for found in store.search_experiments()}
    validated = f"metrics.`{MEASURES['f1']}` >= 0"
    for run in _latest_first(store, list(names), "" if with_selections else validated):
        if not with_selections or store.list_artifacts(run.info.run_id, SELECTIONS):
            latest = names.pop(run.info.experiment_id)
            others = f"; others: {', '.join(names.values())}" if names else ""
            print(printable(f"Experiment {latest}, the latest{others}"), file=sys.stderr)
            return latest
    advice = f"recorded selections; {_ADVICE}" if with_selections else f"has recorded {MEASURES['f1']}"
    raise UserError("experiment", reason=f"no run of this store {advice}")


def find_run(store: MlflowClient, experiment: str, name: str) -> Run:
    """A run by its name or id; if several runs have the name, the latest.

    Raises:
        UserError: there is none; the message lists the nearest names.
    """
    runs = _runs(store, experiment)
    for run in runs:
        if name in (run.info.run_name, run.info.run_id):
            return run
    names = dict.fromkeys(run.info.run_name for run in runs)
    nearest_names = difflib.get_close_matches(name, names, n=3, cutoff=0) or list(names)[:3]
    raise UserError("run", name, reason=f"does not exist; the nearest are {', '.join(map(repr, nearest_names))}")


def latest_with_selections(store: MlflowClient, experiment: str) -> Run:
    """The latest run that recorded selections.

    Raises:
        UserError: no run did.
    """
    for run in _runs(store, experiment):
        if store.list_artifacts(run.info.run_id, SELECTIONS):
            return run
    raise UserError("experiment", reason=f"no run of {experiment!r} recorded selections; {_ADVICE}")


def selections(store: MlflowClient, run: Run) -> list[SelectionRecord]:
    """The selections of a run in order of step: the first before training, the last after it.

    Raises:
        UserError: the run recorded none, or they cannot be read.
    """
    found = [item.path for item in store.list_artifacts(run.info.run_id, SELECTIONS) if item.path.endswith(".npz")]
    if not found:
        raise UserError("run", run.info.run_name, reason="recorded no selections")
    paths = [Path(store.download_artifacts(run.info.run_id, path)) for path in found]
    return sorted((SelectionRecord.load(path) for path in paths), key=lambda record: record.step)


def table(store: MlflowClient, experiment: str) -> pd.DataFrame:
    """The validated runs of an experiment, latest first: one row per run, indexed by run id.

    Columns: ``name``, ``model`` (with ``-dense`` if it was trained densely, and with its system and arguments, or its
    ``head_top_k``), ``lag_size``, ``top_k``, ``kept_share`` (K/L), ``seed`` and those of :data:`MEASURES`. A value is
    NaN if the run did not record it or its attention does not have it.

    Raises:
        UserError: the experiment does not exist, or none of its runs has a validation.
    """
    runs = _runs(store, experiment)
    rows = {run.info.run_id: _row(run) for run in runs if MEASURES["f1"] in run.data.metrics}
    if not rows:
        reason = f"none of the {len(runs)} runs of {experiment!r} has recorded {MEASURES['f1']}"
        raise UserError("experiment", reason=reason)
    return pd.DataFrame.from_dict(rows, orient="index")


def questions(store: MlflowClient, runs: Iterable[str], *, attention: str = OWN) -> pd.DataFrame:
    """The answers of each run at its last validation, indexed by run id and question id.

    Columns: ``question``, ``gold``, ``prediction``, ``f1``. ``attention`` is a name from ``model.evaluate``, or
    ``LRSA`` for the run's own rule.

    Raises:
        UserError: a run recorded no answers, or none under that attention.
    """
    tables = {run_id: pd.DataFrame(_answers(store, run_id, attention)).set_index("id") for run_id in runs}
    return pd.concat(tables, names=["run", "id"])


def shared_scores(answers: pd.DataFrame) -> pd.DataFrame:
    """F1 of each run on the questions that all runs answered, (R, Q).

    Raises:
        UserError: the runs have no question in common.
    """
    scores = answers["f1"].unstack("run").dropna().T
    if scores.shape[1] == 0:
        raise UserError("runs", reason="they have no question in common; compare runs on the same data")
    return scores


def by_rule(runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per model and rule of a :func:`table`: F1 with its interval, and the means of the other measures.

    ``scores`` are the :func:`shared_scores` (R, Q); F1 is averaged over seeds and questions.
    """
    rows = []
    for key, group in runs.loc[scores.index].groupby(RULE, sort=True, dropna=False):
        f1 = statistics.mean(scores.loc[group.index].to_numpy())
        means = group[[name for name in MEASURES if name != "f1"]].mean()
        about = {**dict(zip(RULE, key, strict=True)), "kept_share": group["kept_share"].iloc[0], "runs": len(group)}
        rows.append(about | {"f1": f1.value, "f1_low": f1.low, "f1_high": f1.high, **means})
    return pd.DataFrame(rows)


def differences(runs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of rules: the first's F1 minus the second's, on the same questions, with its interval."""
    groups = {
        title_of_run(*key): scores.loc[group.index].to_numpy()
        for key, group in runs.loc[scores.index].groupby(RULE, sort=True, dropna=False)
    }
    rows = [
        (one, other, *statistics.compare(groups[one], groups[other]).difference)
        for one, other in itertools.combinations(groups, 2)
    ]
    return pd.DataFrame(rows, columns=["first", "second", "mean", "low", "high"])


def answered_by_one(answers: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """The :func:`questions` that exactly one of two runs answers (F1 of 0.5 or more), with both answers."""
    one, other = answers.loc[first], answers.loc[second, ["prediction", "f1"]]
    both = one.join(other, how="inner", lsuffix="_first", rsuffix="_second")
    answered = both[["f1_first", "f1_second"]] >= 0.5
    return both[answered["f1_first"] != answered["f1_second"]].sort_values("f1_first")


def _answers(store: MlflowClient, run_id: str, attention: str) -> list[dict[str, Any]]:
    """The answers of the last validation: all of them, or those in the run's table if it did not record all."""
    folder = ANSWERS.rpartition("/")[0]
    artifacts = [item.path for path in (folder, None) for item in store.list_artifacts(run_id, path)]
    artifact = ANSWERS if ANSWERS in artifacts else QUESTIONS
    if artifact not in artifacts:
        raise UserError("run", run_id, reason=f"has no artifact {QUESTIONS}, so its questions cannot be compared")
    text = Path(store.download_artifacts(run_id, artifact)).read_text(encoding="utf-8")
    if artifact == ANSWERS:
        rows = [json.loads(line) for line in text.splitlines()]
        found = [row | row[attention] for row in rows if attention in row]
    else:
        # pandas' own reader would convert answers such as 1911 to numbers.
        table = json.loads(text)
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        last = max(row["step"] for row in rows)
        found = [
            row | {"prediction": row[attention], "f1": row[f"{attention} F1"]}
            for row in rows
            if row["step"] == last and f"{attention} F1" in row
        ]
    if not found:
        raise UserError("run", run_id, reason=f"recorded no answers under the attention {attention!r}")
    return [{name: row[name] for name in ("id", "question", "gold", "prediction", "f1")} for row in found]


def _runs(store: MlflowClient, experiment: str) -> list[Run]:
    """The runs of an experiment, latest first; raises a UserError if there are none."""
    found = find_experiment(store, experiment, "experiment")
    runs = list(_latest_first(store, [found.experiment_id]))
    if not runs:
        raise UserError("experiment", experiment, reason="has no runs yet")
    return runs


def _latest_first(store: MlflowClient, experiment_ids: list[str], asked: str = "") -> Iterator[Run]:
    """The runs of some experiments that match MLflow's filter ``asked``, latest first, fetched page by page."""
    search = functools.partial(store.search_runs, experiment_ids, asked, order_by=["attributes.start_time DESC"])
    page = search()
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def _row(run: Run) -> dict[str, Any]:
    params, metrics = run.data.params, run.data.metrics
    lag_size, top_k = (int(params[f"model.lrsa.{name}"]) for name in ("lag_size", "top_k"))
    # K of each head is not a single number, and a system has no K, so top_k is NaN for these.
    of_heads, system = (params.get(f"model.lrsa.{name}", "None") for name in ("head_top_k", "system"))
    if (gated := params.get("model.head_gates", "None")) != "None":
        system = gated
    if params.get("model.digests", "None") != "None":
        system = "ICFormer"
    if ranked := _arguments(params, "model.lrsa.head_top_k."):
        of_heads = ",".join(ranked)
    one_k = of_heads == system == "None"
    model = params["model.backbone.source"].rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    if params.get("model.train_attention") == "None":
        model += "-dense"
    if params.get("model.spectra", "None") != "None":
        model += f" spectra={params['model.spectra.ratio']}"
    if of_heads != "None":
        model += f" head_top_k={of_heads}"
    if system != "None":
        given = [text for text in _arguments(params, "model.lrsa.system.") if not text.endswith("=None")]
        model = " ".join([model, system.rpartition(".")[2], *given])
    return {
        "name": run.info.run_name,
        "model": model,
        "lag_size": lag_size if system == "None" else np.nan,
        "top_k": top_k if one_k else np.nan,
        "kept_share": top_k / lag_size if one_k else np.nan,
        "seed": run.data.tags.get("seed"),
        **{column: metrics.get(metric, np.nan) for column, metric in MEASURES.items()},
    }


def _arguments(params: Mapping[str, str], key: str) -> list[str]:
    """The params whose names start with ``key``, as NAME=VALUE, sorted."""
    return [f"{name.removeprefix(key)}={params[name]}" for name in sorted(params) if name.startswith(key)]
