"""Compare a checkpoint's structure with what this run would write, before any library reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lrsa_lit.checkpoints import rng
from lrsa_lit.errors import UserError

KEY = "exact_state"
"""The key of what Lightning's own checkpoints lack."""

_LARGEST = 2**63
_NEEDED = ("loops", "optimizer_states", "lr_schedulers")
"""Keys that Lightning writes into every checkpoint, except into those with weights only."""


def check_form(value: Any, like: Any, name: str) -> None:
    """Raise a UserError unless a value has the types, keys and shapes of another one; additional keys are allowed.

    Args:
        value: a value of a checkpoint.
        like: what this run would write instead. None accepts anything, and an empty dict or list any contents.
        name: the dotted name of ``value`` in the checkpoint.
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
    """Raise a UserError if an optimizer's state belongs to another optimizer or to other weights.

    Args:
        value: the state in a checkpoint.
        like: the ``state_dict`` of this run's optimizer before its first step.
        weights: the optimizer's parameters, in its order.
        name: the dotted name of ``value`` in the checkpoint.
    """
    check_form(value, like, name)
    for number, (found, own) in enumerate(zip(value["param_groups"], like["param_groups"], strict=True)):
        if found["params"] != own["params"]:
            raise malformed(f"{name}.param_groups.{number}.params")
    # The state of a weight can depend on the number of its dimensions, as in Adafactor.
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
    """The error for a value with another structure."""
    reason = f"{name} is missing, or does not have the structure that a fit of this configuration writes"
    return UserError("ckpt_path", reason=reason)


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
    """Whether a value can be the state of a weight: a tensor of its shape, some dimensions reduced, or one number."""
    if not isinstance(held, Tensor) or held.numel() <= 1:
        return isinstance(held, Tensor | int | float | str | None)
    wider = zip(held.shape, weight.shape, strict=False)
    return held.ndim == weight.ndim and all(own in (1, size) for own, size in wider)


class CheckedForm(Callback):
    """Refuse a malformed checkpoint; this callback comes before those that read checkpoints."""

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise a UserError if a part is missing or malformed; optimizers do not exist yet and are checked later."""
        found = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in found:
                check_form(found[callback.state_key], callback.state_dict(), f"callbacks.{type(callback).__name__}")
        if trainer.state.fn == TrainerFn.FITTING:
            self._checkpoint = checkpoint
            if lacking := [name for name in _NEEDED if name not in checkpoint]:
                reason = f"it has no {lacking[0]}, as if saved with save_weights_only"
                hint = "`lrsa export` it and start a new fit from its weights"
                raise UserError("ckpt_path", reason=reason, hint=hint)
            check_form(checkpoint["loops"].get("fit_loop", ()), trainer.fit_loop.state_dict(), "loops.fit_loop")
            _check_exact_state(trainer, checkpoint.get(KEY))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a UserError if the state is of other optimizers or schedules, now that these exist."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        # For sharded checkpoints this list is empty: their reader compares the tensors by name.
        for number, (state, own) in enumerate(zip(checkpoint["optimizer_states"], trainer.optimizers, strict=False)):
            weights = [weight for group in own.param_groups for weight in group["params"]]
            check_optimizer(state, own.state_dict(), weights, f"optimizer_states.{number}")
        schedules = (config.scheduler.state_dict() for config in trainer.lr_scheduler_configs)
        for number, (state, made) in enumerate(zip(checkpoint["lr_schedulers"], schedules, strict=False)):
            check_form(state, made, f"lr_schedulers.{number}")


def _check_exact_state(trainer: Trainer, state: dict[str, Any] | None) -> None:
    # ExactState refuses another number of processes, with advice.
    if state is None or len(state["random"]) != trainer.world_size:
        return
    rank = trainer.global_rank
    _check_random(state["random"][rank], trainer.strategy.root_device, f"{KEY}.random.{rank}")
    check_form(state.get("loaders", ()), [[{}]] * trainer.world_size, f"{KEY}.loaders")


def _check_random(state: Any, device: torch.device, name: str) -> None:
    """Check that a value has the structure of :func:`rng.capture`; a GPU's state may be missing if none was used."""
    like = rng.capture(device)
    if isinstance(state, dict) and "cuda" not in state:
        like.pop("cuda", None)
    check_form(state, like, name)
    (version, _, gauss), (generator, _, position, *_) = state["python"], state["numpy"]
    known = version == like["python"][0] and generator == like["numpy"][0]
    if not known or not isinstance(gauss, float | None) or not 0 <= position <= len(state["numpy"][1]):
        raise malformed(name)
