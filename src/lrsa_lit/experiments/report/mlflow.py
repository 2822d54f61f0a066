"""Results as runs of MLflow: one for each row and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lrsa_lit.errors import redacted
from lrsa_lit.experiments.results import Line, current
from lrsa_lit.experiments.settings import digest
from lrsa_lit.experiments.study import Study
from lrsa_lit.tracking.store import answering, checked_uri, connect, experiment_id

KEY = "study.key"
"""Tag of a run: what its weights came from."""

_PARAMS = {"trainer": "trainer", "data": "data.init_args"}
_MOST = 500
"""Metrics that a store takes at a time, or more."""


def to_mlflow(study: Study, lines: Sequence[Line], uri: str) -> None:
    """Write results into a store; runs that are there already are completed.

    Args:
        study: the experiment is named after it.
        lines: the results; those of weights that were trained anew since stay out.
        uri: of the store.

    Raises:
        UserError: the store cannot be written.
    """
    from mlflow.entities import Metric, Param, RunTag

    uri = checked_uri(uri, "--mlflow")
    client = connect(uri, "--mlflow")
    runs: dict[tuple[str, str, int], list[Line]] = {}
    for line in current(lines):
        runs.setdefault((line["row"], line["config"], line["seed"]), []).append(line)
    with answering(uri, "--mlflow"):
        experiment = experiment_id(client, lines[0]["study"], uri)
        for (row, config, seed), own in runs.items():
            key = f"{row}-{config}-{seed}"
            found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
            if found:
                run_id = found[0].info.run_id
            else:
                tags = {KEY: key, "seed": str(seed), "study.row": row}
                run_id = client.create_run(experiment, tags=tags, run_name=f"{row}-seed{seed}").info.run_id
            params = [Param(name, value) for name, value in _params(study, own).items()]
            metrics = [Metric(name, value, 0, 0) for line in own for name, value in _metrics(line).items()]
            machine = [RunTag(f"machine.{name}", str(value)) for name, value in own[-1]["machine"].items()]
            # Params cannot change; those of an equal config do not.
            client.log_batch(run_id, params=params, tags=[*machine, RunTag("lines", digest(own))])
            for start in range(0, len(metrics), _MOST):
                client.log_batch(run_id, metrics=metrics[start : start + _MOST])
            client.set_terminated(run_id)
    print(f"{len(runs)} runs of experiment {lines[0]['study']!r} in {redacted(uri)}", flush=True)


def _params(study: Study, lines: Sequence[Line]) -> dict[str, str]:
    """What the weights came from, in the words of a fit's params; nothing has trained the base LLM, so it has few."""
    line = lines[0]
    trained = [line["settings"] for line in lines if line["kind"] == "training"]
    known = [row.trained_by() for row in study.rows.values() if row.hash == line["config"]]
    settings: dict[str, Any] = next(iter(trained + known), {})
    named = {_PARAMS.get(name, f"model.{name}"): value for name, value in settings.items() if name != "attention"}
    if "attention" in settings:
        rule = settings["attention"]
        named |= {"model.train_attention": None} if rule is None else {"model.lrsa": rule}
    return _flat({"study.row": line["row"], "seed_everything": line["seed"], **named})


def _metrics(line: Line) -> dict[str, float]:
    """Means of a line, by names that the UI groups."""
    if line["kind"] == "training":
        named = {
            "train/loss": line["loss_of_last_20_steps"],
            "perf/tokens_per_second": line["tokens_per_second"],
            "perf/peak_memory_bytes": line["peak_memory_bytes"],
        }
        return {name: float(value) for name, value in named.items() if value is not None}
    stem = f"{line['split']}/{line['set']}/{line['attention']}"
    means = {f"{stem}/{name}": math.fsum(line[name]) / len(line[name]) for name in ("f1", "em", "recall") if line[name]}
    means[f"{stem}/loss"] = math.fsum(line["loss"]) / sum(line["tokens"])
    means[f"{stem}/kv_share"] = line["kv_share"]
    if line.get("survival"):
        kept = {f"{stem}/{name}_kept": line["survival"][name] for name in ("gold", "answer")}
        means |= {name: share for name, share in kept.items() if share is not None}
    return means


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)[:250]
    return found
