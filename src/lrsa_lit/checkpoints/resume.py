"""Find the checkpoint for a command, and check whether a run can resume from it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version
from torch import Tensor

from lrsa_lit.checkpoints.checkpoint_io import newest_first, tidy
from lrsa_lit.checkpoints.exact_state import other_processes
from lrsa_lit.checkpoints.form import KEY
from lrsa_lit.errors import UserError
from lrsa_lit.io import sha256_of
from lrsa_lit.models.checkpoint import typed
from lrsa_lit.models.checkpoint_file import Unreadable, damage, read, unusable
from lrsa_lit.paths import check_path

LAST = "last"
"""This path means the newest good checkpoint of the configuration."""

RUN = "mlflow_run"
"""The key of the id of the run that wrote a checkpoint."""

_SECTION = dict[str, Any]
_VERSION = "pytorch-lightning_version"
"""A key that every checkpoint of Lightning has, and no other torch file."""

_PARTS: dict[str, Any] = {"epoch": int, "global_step": int, "loops": _SECTION, "callbacks": _SECTION, RUN: str}
_PARTS |= {"state_dict": dict[str, Tensor], "optimizer_states": list[_SECTION], "lr_schedulers": list[_SECTION]}
"""What Lightning writes into a checkpoint and needs to resume."""

_log = logging.getLogger("lrsa_lit.checkpoints")
# Settings that do not change training: other data splits, and workers, which do not change the order.
_INDIFFERENT = {"val", "test", "evaluate_on", "eval_batch_size", "num_workers"}
_RULES = ("model.lrsa.", "model.train_attention.")
_SCHEDULE = "model.lr_scheduler."
_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


class About(NamedTuple):
    """What a checkpoint says about the run that wrote it; None where it says nothing.

    Attributes:
        settings: the settings by dotted name, as from :func:`settings_of`.
        processes: the number of processes.
        run: the id of the run, if it has one.
        step: the number of optimizer steps done.
    """

    settings: dict[str, str] | None
    processes: int | None
    run: str | None
    step: int


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a resolved config that determine the weights, by dotted name, as JSON.

    Files that the rule reads, such as budgets and gates, are represented by a digest of their contents.
    """
    kept = {name: config.get(name) for name in ("seed_everything", "model", "data")}
    trainer = config.get("trainer") or {}
    kept["trainer"] = {name: trainer.get(name) for name in _TRAINER}
    settings = {name: value for name, value in _leaves("", kept) if not _is_indifferent(name)}
    return settings | files_of(config)


def files_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the files that the rule of a resolved config reads, by the setting's dotted name."""
    found = {}
    for name, value in _leaves("", {"model": config.get("model")}):
        if name.startswith(_RULES) and isinstance(path := json.loads(value), str):
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                found[name] = json.dumps(f"file {sha256_of(Path(path).expanduser())[:12]}")
    return found


def about(path: Path) -> About:
    """Read what a checkpoint says about its run; Unreadable if it is damaged or was not written by Lightning.

    The bytes of tensors are not checked; see :func:`damage`.
    """
    content = read(path, tensors=False)
    try:
        Version(typed(str, content.get(_VERSION), _VERSION))
    except InvalidVersion:
        raise Unreadable(f"{_VERSION} is not a version") from None
    for name, kind in _PARTS.items():
        if name in content:
            typed(kind, content[name], name)
    state, run, step = content.get(KEY), content.get(RUN), content.get("global_step", 0)
    if state is None:
        return About(None, None, run, step)
    if not isinstance(state, dict) or not isinstance(state.get("random"), list):
        raise Unreadable(f"{KEY} does not have the structure that a fit writes")
    settings = typed(dict[str, str], state.get("settings") or {}, f"{KEY}.settings")
    return About(settings or None, len(state["random"]), run, step)


def writer_of(path: Path) -> str | None:
    """The id of the run that wrote a checkpoint; None where the checkpoint does not say."""
    with contextlib.suppress(Unreadable):
        return about(path).run
    return None


def named(path: Path) -> Path:
    """Check a checkpoint that the user named, and return its path.

    Raises:
        UserError: it cannot be read; the error suggests the newest good one in its folder.
    """
    check_path("ckpt_path", path)
    if not path.exists():
        raise UserError("ckpt_path", str(path), f"a checkpoint written by a fit, or {LAST}", reason="does not exist")
    found = damage(path) or _about(path)
    if isinstance(found, str):
        others = (other for other in newest_first(path.parent) if other != path and damage(other) is None)
        error = unusable(path, found)
        error.hint = next((f"the newest good one in its folder is {other}" for other in others), "")
        raise error
    return path


def _about(path: Path) -> About | str:
    """What a checkpoint says about its run, or why it cannot be read."""
    try:
        return about(path)
    except Unreadable as error:
        return str(error)


def _latest_first(folders: list[Path]) -> Iterator[tuple[Path, About | str]]:
    """Checkpoints by run, the run that wrote last first; within a run by steps, as clocks may have been set back."""
    inside = [paths for folder in folders if (paths := newest_first(folder))]
    for paths in sorted(inside, key=lambda paths: paths[0].stat().st_mtime_ns, reverse=True):
        places: dict[str | Path, int] = {}
        found = []
        for path in paths:
            says = _about(path)
            run, step = (None, 0) if isinstance(says, str) else (says.run, says.step)
            # A checkpoint without a run id counts as a separate run.
            place = places.setdefault(run or path, len(places))
            found.append((place, -step, path, says))
        yield from ((path, says) for _, _, path, says in sorted(found, key=lambda each: each[:2]))


def last(
    folders: Iterable[Path], settings: Mapping[str, str], prefix: str = "", steps: int | None = None
) -> Path | None:
    """The newest good checkpoint of a configuration; damaged ones are logged and skipped.

    Configurations are the same if all :func:`settings_of` them whose names start with the prefix are equal. If there is
    no checkpoint of this configuration, the result is None and the log names the newest one of another configuration.

    Args:
        folders: the folders of checkpoints.
        settings: those of the configuration.
        prefix: compare only settings whose names start with it.
        steps: ``trainer.max_steps`` of a fit.

    Raises:
        UserError: there are checkpoints, but all are damaged; or the newest one differs only in the length of its
            learning-rate schedule: a new run in its place would not be what "last" promises.
    """
    damaged: list[Path] = []
    other = ""
    of_other_length: UserError | None = None
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        tidy(folder)
    for path, found in _latest_first(folders):
        changes = [] if isinstance(found, str) else differences(found.settings, settings, prefix)
        if changes:
            if of_other_length is None and not isinstance(found, str):
                planned = _planned(found.settings, settings, steps)
                if len(planned) == len(changes):
                    of_other_length = _other_length(path, planned[0], steps)
            other = other or f"the newest, {path}, has {_listed(changes)}"
        elif (reason := found if isinstance(found, str) else damage(path)) is None:
            return path
        else:
            _log.warning("%s is truncated or damaged (%s), so it is skipped", path, reason)
            damaged.append(path)
    if damaged:
        reason = f"{LAST} finds no good checkpoint; damaged: {', '.join(map(str, damaged))}"
        raise UserError("ckpt_path", reason=reason, hint=other)
    if of_other_length is not None:
        raise of_other_length
    if other:
        _log.warning("No checkpoint of this configuration; %s", other)
    return None


def check_continues(path: Path, found: About, settings: Mapping[str, str], processes: int, steps: int) -> bool:
    """Whether a fit of ``steps`` optimizer steps in all resumes with the same settings.

    Raises:
        UserError: its position in the data, or the length of its learning-rate schedule, would change.
    """
    if found.processes is not None and found.processes != processes:
        raise other_processes(found.processes, processes)
    changes = differences(found.settings, settings)
    order = [change for change in changes if change.startswith(("data.", "seed_everything"))]
    if order:
        reason = f"{path} was written with {_listed(order)}, which changes the order of the training data"
        hint = "resume with the same value, or `lrsa export` it and start a new fit from its weights"
        raise UserError("ckpt_path", reason=reason, hint=hint)
    if planned := _planned(found.settings, settings, steps):
        raise _other_length(path, planned[0], steps)
    if changes:
        _log.warning("Resumed with other settings, so not equal to an uninterrupted run: %s", _listed(changes))
    return not changes


def differences(before: Mapping[str, str] | None, now: Mapping[str, str], prefix: str = "") -> list[str]:
    """Settings that changed, such as ``model.lrsa.top_k 8 (here 4)``; empty if the earlier ones are unknown."""
    return [f"{name} {old} (here {new})" for name, old, new in _changed(before, now) if name.startswith(prefix)]


def _changed(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The settings that changed, each with its old and its new value."""
    if before is None:
        return []
    names = sorted(before.keys() | now.keys())
    every = [(name, before.get(name, "null"), now.get(name, "null")) for name in names]
    return [(name, old, new) for name, old, new in every if old != new]


def _planned(before: Mapping[str, str] | None, now: Mapping[str, str], steps: int | None) -> list[str]:
    """The old values of changed settings of the learning-rate schedule that follow ``trainer.max_steps``.

    Torch restores them with the schedule's state, so they cannot be changed when a fit is resumed.
    """
    of_schedule = [each for each in _changed(before, now) if each[0].startswith(_SCHEDULE)]
    return [old for _, old, new in of_schedule if new == str(steps) and old.isdecimal()]


def _other_length(path: Path, planned: str, steps: int | None) -> UserError:
    reason = f"the learning-rate schedule of {path} ends at step {planned}, not at trainer.max_steps {steps}"
    hint = (
        f"resume with trainer.max_steps {planned}; or train longer in a new run from these weights: without "
        f"--ckpt_path, with --model.start_from {path}"
    )
    return UserError("ckpt_path", reason=reason, hint=hint)


def _listed(changes: list[str]) -> str:
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ", ".join(changes[:3]) + more


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), part)
    else:
        yield name, json.dumps(value, sort_keys=True, default=str)


def _is_indifferent(name: str) -> bool:
    of_data = name.startswith("data.") and name.rpartition(".")[2] in _INDIFFERENT
    return of_data or name.startswith(("model.evaluate", "model.max_new_tokens"))
