"""Schedules of K, the pairs kept of each partition, over training steps."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.errors import UserError


class TopKSchedule(ABC):
    """Computes K from only the run's seed and the step, so that a resumed run continues with the same values."""

    @abstractmethod
    def __call__(self, seed: int, step: int, rule: LRSAConfig) -> int:
        """K in an optimizer step, counted from 0, of a run that trains with ``rule``."""

    @abstractmethod
    def check(self, rule: LRSAConfig) -> None:
        """Raise a UserError if K could be out of bounds for the rule in some step."""


@dataclass(frozen=True)
class SampledTopK(TopKSchedule):
    """Draw K in each step from a list, to train one model for all of these values.

    Args:
        choices: at least one K. All entries are equally likely, so a K that is listed twice is twice as likely.
    """

    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        """Convert YAML's list to a tuple, and check it."""
        object.__setattr__(self, "choices", tuple(self.choices))
        if not self.choices:
            raise UserError("choices", self.choices, "a list of at least one K")

    def __call__(self, seed: int, step: int, rule: LRSAConfig) -> int:
        """One of the choices."""
        return random.Random(f"{seed}:{step}:top_k").choice(self.choices)

    def check(self, rule: LRSAConfig) -> None:
        """Check that each choice is in [0, L]."""
        for top_k in self.choices:
            _check_top_k("choices", rule, top_k)


@dataclass(frozen=True)
class AnnealedTopK(TopKSchedule):
    """Change K linearly from a start value to the rule's K, and keep it there.

    Args:
        steps: number of steps until K reaches the rule's value.
        start: K in the first step; null means lag_size, which drops nothing.
    """

    steps: int
    start: int | None = None

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.steps < 1:
            raise UserError("steps", self.steps, "an integer >= 1")

    def __call__(self, seed: int, step: int, rule: LRSAConfig) -> int:
        """The interpolated K, rounded to an integer."""
        start = rule.lag_size if self.start is None else self.start
        return round(start + (rule.top_k - start) * min(step / self.steps, 1.0))

    def check(self, rule: LRSAConfig) -> None:
        """Check that the start is in [0, L]."""
        _check_top_k("start", rule, self(0, 0, rule))


def check_schedule(schedule: TopKSchedule | None, rule: LRSAConfig | None) -> None:
    """Refuse a schedule that does not apply to the training attention (None means dense) or is out of its bounds."""
    if schedule is None:
        return
    if rule is None:
        raise UserError("train_top_k", reason="it is not allowed if train_attention is null (dense)")
    for name, has in (("head_top_k", "a K for each layer"), ("system", "no K")):
        if getattr(rule, name) is not None:
            raise UserError("train_top_k", reason=f"it is not allowed with {name}, which has {has}")
    schedule.check(rule)


def _check_top_k(name: str, rule: LRSAConfig, top_k: int) -> None:
    try:
        rule.replace(top_k=top_k)
    except UserError as error:
        raise UserError(name, top_k, error.allowed) from None
