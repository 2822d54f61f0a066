"""Tasks of lm-evaluation-harness, which are loaded before the model, and its results as files and as numbers."""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from lrsa_lit.errors import UserError, message_of

Results = dict[str, Any]
"""What ``lm_eval.simple_evaluate`` returns."""

_OWN_GEN_KWARGS = ("until", "max_gen_toks", "max_tokens", "max_completion_tokens")
"""Generation arguments of the harness, in addition to those of transformers."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


def load_tasks(
    names: Sequence[str], include_path: Path | None, metadata: Mapping[str, Any]
) -> tuple[list[Any], TaskManager]:
    """Load tasks and groups with their documents, by name; a name in .yaml is a file.

    The harness's own tasks are searched only if ``include_path`` and files do not have all names.

    Returns:
        The tasks and groups, and the manager that has loaded them.

    Raises:
        UserError: a task does not exist or cannot be loaded.
    """
    manager = TaskManager(include_path=_folder(include_path), include_defaults=False, metadata=dict(metadata))
    if any(not _is_file(name) and not manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=_folder(include_path), metadata=dict(metadata))
    found: list[Any] = []
    for name in names:
        matching = [str(Path(name).absolute())] if _is_file(name) else manager.match_tasks([name])
        if not matching:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else "`lm_eval ls tasks` lists them"
            raise UserError("--tasks", name, reason="is not a task of lm-evaluation-harness", hint=hint)
        for each in matching:
            try:
                loaded = manager.load(each)
            # Loading may raise any exception: documents come from anywhere, and a task may run its own code.
            except Exception as error:
                reason = f"cannot be loaded: {message_of(error)[:300] or type(error).__name__}"
                raise UserError("--tasks", name, reason=reason) from error
            inner = {child for children in loaded["group_map"].values() for child in children}
            groups = [group for title, group in loaded["groups"].items() if title not in inner]
            found += groups or list(loaded["tasks"].values())
    try:
        manager.load(found)
    except Exception as error:
        reason = f"cannot be evaluated together: {message_of(error)[:300]}"
        raise UserError("--tasks", ",".join(names), reason=reason) from error
    return found, manager


def output_types(tasks: Sequence[Any]) -> set[str]:
    """The harness's names of the kinds of requests of tasks and groups."""
    each = (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task] for task in tasks)
    return {str(task.OUTPUT_TYPE) for some in each for task in some}


def _folder(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def check_gen_kwargs(text: str | None) -> None:
    """Raise a UserError if generation arguments are not NAME=VALUE, or if neither library knows a name."""
    from transformers import GenerationConfig

    known = {*GenerationConfig().to_dict(), *_OWN_GEN_KWARGS}
    for part in (text or "").split(","):
        name, assigned, _ = part.partition("=")
        if part and (not assigned or name not in known):
            nearest = difflib.get_close_matches(name, known, n=3)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else ""
            raise UserError("--gen-kwargs", part, "generation arguments as NAME=VALUE,…", hint=hint)


def quiet() -> None:
    """Let the harness log only warnings, and of tasks' settings only errors, because it adds its own defaults."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    for name in ("api.task", "config.task"):
        logging.getLogger(f"lm_eval.{name}").setLevel(logging.ERROR)


def metrics_of(results: Results) -> dict[str, float]:
    """Each score and its standard error as ``eval/TASK/METRIC``, or with ``/FILTER`` after that if it has a filter."""
    found: dict[str, float] = {}
    for task, scores in {**results.get("groups", {}), **results["results"]}.items():
        for name, value in scores.items():
            metric, _, of = name.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.startswith("sample_"):
                continue
            if math.isfinite(value):
                parts = ["eval", task, metric, *([of] if of not in ("", "none") else [])]
                found[_NOT_IN_NAMES.sub("_", "/".join(parts))] = float(value)
    return found


def table_of(results: Results) -> str:
    """The table that the harness prints."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def write(results: Results, folder: Path) -> None:
    """Write results.json, table.md and, for each task, its questions and answers as samples_TASK.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in results.get("samples", {}).items():
        with (folder / f"samples_{_NOT_IN_NAMES.sub('_', task).replace('/', '_')}.jsonl").open(
            "w", encoding="utf-8"
        ) as file:
            for sample in samples:
                file.write(json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n")
    rest = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(rest, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table_of(results), encoding="utf-8")
