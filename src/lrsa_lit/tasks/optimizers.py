"""The optimizer and the schedule that settings describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lrsa_lit.errors import UserError, message_of

Built = TypeVar("Built")


def optimizer_of(
    make_optimizer: Callable[[Any], Any], make_scheduler: Callable[[Any], Any] | None, parameters: list[nn.Parameter]
) -> tuple[Any, Any]:
    """An optimizer over parameters and its schedule, or None; a UserError if one of them cannot be made."""
    optimizer = _built("optimizer", make_optimizer, parameters)
    if make_scheduler is None:
        return optimizer, None
    scheduler = _built("lr_scheduler", make_scheduler, optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        allowed = "one without a metric, as it is stepped after each optimizer step"
        raise UserError("lr_scheduler", type(scheduler).__name__, allowed)
    return optimizer, scheduler


def _built(field: str, build: Callable[[Any], Built], argument: Any) -> Built:
    """What an argument of the task builds; its complaint becomes one line that names the argument."""
    try:
        return build(argument)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(field, reason=message_of(error)) from error
