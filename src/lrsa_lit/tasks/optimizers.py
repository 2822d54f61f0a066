"""Create and check the optimizer and the schedule of the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.models.checkpoint import spectra_in
from lrsa_lit.tasks.trained_part import TrainedPart

_LONGER = "or train longer in a new run that starts from its weights (model.start_from)"
Built = TypeVar("Built")


def optimizer_of(
    make_optimizer: Callable[[Any], Any],
    make_scheduler: Callable[[Any], Any] | None,
    parameters: list[nn.Parameter],
    part: TrainedPart | None = None,
) -> tuple[Any, Any]:
    """The optimizer of some parameters and its schedule, or None; a UserError if one of them cannot be created.

    A part that is trained instead of weights may group the parameters and change the optimizer.
    """
    optimizer = _built("optimizer", make_optimizer, parameters if part is None else part.groups(parameters))
    if part is not None:
        part.prepare(optimizer)
    if make_scheduler is None:
        return optimizer, None
    asked = [group["lr"] for group in optimizer.param_groups]
    scheduler = _built("lr_scheduler", make_scheduler, optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        allowed = "a schedule without a metric, because it is stepped after each optimizer step"
        raise UserError("lr_scheduler", type(scheduler).__name__, allowed)
    first = optimizer.param_groups[0]["lr"]
    for group, rate in zip(optimizer.param_groups, asked, strict=True):
        if not math.isclose(group["lr"] * asked[0], first * rate, rel_tol=1e-6, abs_tol=1e-12):
            allowed = "a schedule that scales the rates of all groups alike, such as CosineAnnealingLR, or null"
            raise UserError("lr_scheduler", type(scheduler).__name__, allowed)
    return optimizer, scheduler


def check_length(checkpoint: Mapping[str, Any], steps: int) -> None:
    """Refuse to resume with another number of steps than a checkpoint's schedule was made for."""
    schedules = [("its learning-rate schedule is", state) for state in checkpoint.get("lr_schedulers", [])[:1]]
    for what, state in (*schedules, ("its sequence of phases is", spectra_in(checkpoint) or {})):
        if (planned := state.get("total_steps")) not in (None, steps):
            reason = f"{what} {planned} steps long and cannot be changed to max_steps={steps}"
            raise UserError("ckpt_path", reason=f"{reason}; resume with max_steps={planned}", hint=_LONGER)


def _built(field: str, build: Callable[[Any], Built], argument: Any) -> Built:
    """Call a factory from the settings; its errors become a UserError that names the argument."""
    try:
        return build(argument)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(field, reason=message_of(error)) from error
