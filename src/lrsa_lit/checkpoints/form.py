"""The form of what a checkpoint holds, compared with what this run would write, before any library reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lrsa_lit.errors import UserError

_LARGEST = 2**63


def check_form(value: Any, like: Any, name: str) -> None:
    """Check that a value has the types, keys and shapes of another one; it may have more keys.

    Args:
        value: of a checkpoint.
        like: what this run would write in its place. None, and an empty dict or list, say nothing of what they hold.
        name: the dotted name of ``value`` in the checkpoint.

    Raises:
        UserError: it has another form.
    """
    if like is None:
        return
    if not _is_like(value, like):
        raise malformed(name)
    if isinstance(like, Mapping):
        for key, part in like.items():
            if key not in value:
                raise malformed(f"{name}.{key}")
            check_form(value[key], part, f"{name}.{key}")
    elif isinstance(like, list | tuple) and like:
        if len(value) != len(like):
            raise malformed(name)
        for number, (found, part) in enumerate(zip(value, like, strict=True)):
            check_form(found, part, f"{name}.{number}")


def check_optimizer(value: Any, like: Mapping[str, Any], weights: Sequence[Tensor], name: str) -> None:
    """Check the state of an optimizer.

    Args:
        value: of a checkpoint.
        like: the ``state_dict`` of this run's optimizer, which has not made a step.
        weights: its parameters, in its own order.
        name: the dotted name of ``value`` in the checkpoint.

    Raises:
        UserError: it is of another optimizer or of other weights.
    """
    check_form(value, like, name)
    for number, (found, own) in enumerate(zip(value["param_groups"], like["param_groups"], strict=True)):
        if found["params"] != own["params"]:
            raise malformed(f"{name}.param_groups.{number}.params")
    # What an optimizer keeps of a weight depends on the number of its dimensions, as Adafactor's does.
    kept: dict[int, Mapping[str, Any]] = {}
    for key, state in value["state"].items():
        of = f"{name}.state.{key}"
        if not isinstance(key, int) or not 0 <= key < len(weights) or not isinstance(state, Mapping):
            raise malformed(of)
        weight = weights[key]
        first = kept.setdefault(weight.ndim, state)
        if state.keys() != first.keys():
            raise malformed(f"{of}.{min(map(str, state.keys() ^ first.keys()))}")
        for part, held in state.items():
            if type(held) is not type(first[part]) or not _fits(held, weight):
                raise malformed(f"{of}.{part}")


def malformed(name: str) -> UserError:
    """What to say of a value of another form."""
    return UserError(
        f"ckpt_path: {name} is missing, or has not the form that a fit of this configuration writes and goes on from"
    )


def _is_like(value: Any, like: Any) -> bool:
    if isinstance(like, Tensor):
        # Precisions may differ; torch converts between them.
        same = isinstance(value, Tensor) and value.shape == like.shape
        return same and value.is_complex() == like.is_complex()
    if isinstance(like, bool | str):
        return isinstance(value, type(like))
    if isinstance(like, int | float):
        kinds = int if isinstance(like, int) else (int, float, Tensor)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return number and (not isinstance(value, int) or -_LARGEST <= value < _LARGEST)
    for kind in (Mapping, list | tuple):
        if isinstance(like, kind):
            return isinstance(value, kind)
    return True


def _fits(held: Any, weight: Tensor) -> bool:
    """Whether a value can be kept of a weight: a tensor of its shape, or of one or no number along a dimension."""
    if not isinstance(held, Tensor) or held.numel() <= 1:
        return isinstance(held, Tensor | int | float | str | None)
    wider = zip(held.shape, weight.shape, strict=False)
    return held.ndim == weight.ndim and all(own in (1, size) for own, size in wider)
