"""Tasks of lm-evaluation-harness, loaded before a model is, and what it found, as files and as numbers."""

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
"""What the harness takes beside the arguments of transformers."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")


def load_tasks(
    names: Sequence[str], include_path: Path | None, metadata: Mapping[str, Any]
) -> tuple[list[Any], TaskManager]:
    """The tasks and groups of some names, with their documents, and what knows them; a name in .yaml is a file.

    The harness's own tasks are looked through only where other ones do not have all names.

    Raises:
        UserError: there is none of a name, or one cannot be loaded.
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
            raise UserError("--tasks", name, reason="is no task of lm-evaluation-harness", hint=hint)
        for each in matching:
            try:
                loaded = manager.load(each)
            # Documents come from anywhere, and a task may run code of its own.
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
    """The kinds of requests of tasks and groups, as the harness calls them."""
    each = (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task] for task in tasks)
    return {str(task.OUTPUT_TYPE) for some in each for task in some}


def _folder(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def check_gen_kwargs(text: str | None) -> None:
    """Raise a UserError if arguments of generation are no NAME=VALUE, or ones that neither library knows."""
    from transformers import GenerationConfig

    known = {*GenerationConfig().to_dict(), *_OWN_GEN_KWARGS}
    for part in (text or "").split(","):
        name, assigned, _ = part.partition("=")
        if part and (not assigned or name not in known):
            nearest = difflib.get_close_matches(name, known, n=3)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else ""
            raise UserError("--gen-kwargs", part, "arguments of generate as NAME=VALUE,…", hint=hint)


def quiet() -> None:
    """Let the harness log warnings alone, and of tasks' settings, to which it adds defaults of its own, only errors."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    for name in ("api.task", "config.task"):
        logging.getLogger(f"lm_eval.{name}").setLevel(logging.ERROR)


def metrics_of(results: Results) -> dict[str, float]:
    """Each score as ``eval/TASK/METRIC``, and its standard error; with the name of a filter where it has one."""
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
    """Write results.json, table.md and, for each task, what it asked and was answered as samples_TASK.jsonl."""
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
