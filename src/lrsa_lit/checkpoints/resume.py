"""Which checkpoint a command takes, and whether a run can go on from it."""

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
"""As a path: the newest good checkpoint of this configuration."""

RUN = "mlflow_run"
"""Where a checkpoint keeps the id of the run that wrote it."""

_SECTION = dict[str, Any]
_VERSION = "pytorch-lightning_version"
"""What every checkpoint of Lightning says, and no other file of torch."""

_PARTS: dict[str, Any] = {"epoch": int, "global_step": int, "loops": _SECTION, "callbacks": _SECTION, RUN: str}
_PARTS |= {"state_dict": dict[str, Tensor], "optimizer_states": list[_SECTION], "lr_schedulers": list[_SECTION]}
"""What Lightning writes into a checkpoint, and goes on from."""

_log = logging.getLogger("lrsa_lit.checkpoints")
# Data that is not trained on, and the workers, which do not change the order.
_INDIFFERENT = {"val", "test", "evaluate_on", "eval_batch_size", "num_workers"}
_RULES = ("model.lrsa.", "model.train_attention.")
_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


class About(NamedTuple):
    """What a checkpoint says about the run that wrote it; None where it does not say.

    Attributes:
        settings: by dotted name, as :func:`settings_of` has them.
        processes: how many wrote it.
        run: the id of the run, where it has one.
        step: the optimizer steps that were done.
    """

    settings: dict[str, str] | None
    processes: int | None
    run: str | None
    step: int


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What of a resolved config decides the weights, by dotted name, as JSON.

    A file that the rule is read from, as budgets and gates are, stands there by its content.
    """
    kept = {name: config.get(name) for name in ("seed_everything", "model", "data")}
    trainer = config.get("trainer") or {}
    kept["trainer"] = {name: trainer.get(name) for name in _TRAINER}
    settings = {name: value for name, value in _leaves("", kept) if not _is_indifferent(name)}
    return settings | files_of(config)


def files_of(config: Mapping[str, Any]) -> dict[str, str]:
    """By dotted name, the digests of the files that the rule of a resolved config is read from."""
    found = {}
    for name, value in _leaves("", {"model": config.get("model")}):
        if name.startswith(_RULES) and isinstance(path := json.loads(value), str):
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                found[name] = json.dumps(f"file {sha256_of(Path(path).expanduser())[:12]}")
    return found


def about(path: Path) -> About:
    """Read what a checkpoint says about its run; Unreadable if Lightning has not written it, or it is damaged.

    The bytes of its tensors are not checked; see :func:`damage`.
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
        raise Unreadable(f"{KEY} has not the form that a fit writes")
    settings = typed(dict[str, str], state.get("settings") or {}, f"{KEY}.settings")
    return About(settings or None, len(state["random"]), run, step)


def named(path: Path) -> Path:
    """A checkpoint that somebody has named; if it cannot be read, a UserError names the newest good one beside it."""
    check_path("ckpt_path", path)
    if not path.exists():
        raise UserError("ckpt_path", str(path), f"a checkpoint that a fit has written, or {LAST}", reason="is no file")
    found = damage(path) or _about(path)
    if isinstance(found, str):
        others = (other for other in newest_first(path.parent) if other != path and damage(other) is None)
        error = unusable(path, found)
        error.hint = next((f"the newest good one beside it is {other}" for other in others), "")
        raise error
    return path


def _about(path: Path) -> About | str:
    """What a checkpoint says, or why it cannot be read."""
    try:
        return about(path)
    except Unreadable as error:
        return str(error)


def _latest_first(folders: list[Path]) -> Iterator[tuple[Path, About | str]]:
    """The run that wrote last comes first, and of each run the most steps: a clock may have been set back since."""
    inside = [paths for folder in folders if (paths := newest_first(folder))]
    for paths in sorted(inside, key=lambda paths: paths[0].stat().st_mtime_ns, reverse=True):
        places: dict[str | Path, int] = {}
        found = []
        for path in paths:
            says = _about(path)
            run, step = (None, 0) if isinstance(says, str) else (says.run, says.step)
            # One of no run is a run of its own, as nothing says that its neighbours belong to it.
            place = places.setdefault(run or path, len(places))
            found.append((place, -step, path, says))
        yield from ((path, says) for _, _, path, says in sorted(found, key=lambda each: each[:2]))


def last(folders: Iterable[Path], settings: Mapping[str, str], prefix: str = "") -> Path | None:
    """The newest good checkpoint of a configuration; those that are damaged are named and passed over.

    None where no run of this configuration has saved one: the log names the newest one of another. It is the same
    configuration where all :func:`settings_of` it whose names begin with the prefix are.

    Raises:
        UserError: there are some, and all are damaged.
    """
    damaged: list[Path] = []
    other = ""
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        tidy(folder)
    for path, found in _latest_first(folders):
        changes = [] if isinstance(found, str) else differences(found.settings, settings, prefix)
        if changes:
            other = other or f"the newest, {path}, has {_listed(changes)}"
        elif (reason := found if isinstance(found, str) else damage(path)) is None:
            return path
        else:
            _log.warning("%s is truncated or damaged (%s) and passed over", path, reason)
            damaged.append(path)
    if damaged:
        reason = f"{LAST} finds no good checkpoint; damaged: {', '.join(map(str, damaged))}"
        raise UserError("ckpt_path", reason=reason, hint=other)
    if other:
        _log.warning("No checkpoint of this configuration; %s", other)
    return None


def check_continues(path: Path, found: About, settings: Mapping[str, str], processes: int) -> bool:
    """Whether a fit goes on with the same settings; a UserError if its position in the data would be another one."""
    if found.processes is not None and found.processes != processes:
        raise other_processes(found.processes, processes)
    changes = differences(found.settings, settings)
    order = [change for change in changes if change.startswith(("data.", "seed_everything"))]
    if order:
        reason = f"{path} was written with {_listed(order)}, which decides the order of the training data"
        hint = "resume with that, or `lrsa export` it and start a new fit from its weights"
        raise UserError("ckpt_path", reason=reason, hint=hint)
    if changes:
        _log.warning("Resumed with other settings, so not as an uninterrupted run: %s", _listed(changes))
    return not changes


def differences(before: Mapping[str, str] | None, now: Mapping[str, str], prefix: str = "") -> list[str]:
    """Settings that changed, such as ``model.lrsa.top_k 8 (here 4)``; none where nothing is known."""
    if before is None:
        return []
    names = sorted(name for name in before.keys() | now.keys() if name.startswith(prefix))
    pairs = {name: (before.get(name, "null"), now.get(name, "null")) for name in names}
    return [f"{name} {old} (here {new})" for name, (old, new) in pairs.items() if old != new]


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
