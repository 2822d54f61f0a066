"""A length curriculum: until a step, no example longer than so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lrsa_lit.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A part of a training.

    Attributes:
        max_tokens: most tokens of an example in it.
        until_step: the optimizer step that it ends before; None for the last one.
    """

    max_tokens: int
    until_step: int | None = None


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse stages that do not follow one another.

    Raises:
        UserError: they do not.
    """
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        if last and stage.until_step is not None:
            raise UserError(f"curriculum.{number}.until_step", stage.until_step, "null for the last stage")
        if not last and (stage.until_step is None or stage.until_step < 1):
            raise UserError(f"curriculum.{number}.until_step", stage.until_step, "1 or more")
        if stage.max_tokens < 1:
            raise UserError(f"curriculum.{number}.max_tokens", stage.max_tokens, "1 or more")
    for number, (before, stage) in enumerate(pairwise(stages), start=1):
        for name in ("max_tokens", "until_step"):
            value, least = getattr(stage, name), getattr(before, name) + 1
            if value is not None and value < least:
                raise UserError(f"curriculum.{number}.{name}", value, f"{least} or more")


def check_lengths(stages: Sequence[Stage], lengths: Sequence[int]) -> None:
    """Refuse a first stage without any example, and a last one that leaves some out.

    Raises:
        UserError: one of them.
    """
    if not stages:
        return
    first, last = stages[0].max_tokens, stages[-1].max_tokens
    if first < min(lengths):
        shortest = f"{min(lengths)} or more, as the shortest training example has so many tokens"
        raise UserError("curriculum.0.max_tokens", first, shortest)
    if last < max(lengths):
        longest = f"{max(lengths)} or more, as the longest training example has so many tokens and is to be seen"
        raise UserError(f"curriculum.{len(stages) - 1}.max_tokens", last, longest)


def segments(stages: Sequence[Stage], epoch: int, batches: int, batches_a_step: int) -> list[tuple[int, int]]:
    """How an epoch divides into stages.

    Args:
        stages: the curriculum, at least one stage.
        epoch: its number.
        batches: of each epoch, on one rank.
        batches_a_step: that gradients are accumulated over; an epoch ends with a step in any case.

    Returns:
        The most tokens of an example, and the number of batches, of each stage that the epoch has a part of.
    """
    first_step = epoch * -(-batches // batches_a_step)
    found, start = [], 0
    for stage in stages:
        stop = batches if stage.until_step is None else (stage.until_step - first_step) * batches_a_step
        stop = min(max(stop, start), batches)
        if stop > start:
            found.append((stage.max_tokens, stop - start))
        start = stop
    return found
