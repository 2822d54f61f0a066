"""How many pairs K a partition keeps in a training step, where it is not the same in all of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.errors import UserError


class TopKSchedule(ABC):
    """Decides K by the run's seed and the step alone, so that a resumed run goes on with the same."""

    @abstractmethod
    def __call__(self, seed: int, step: int, rule: LRSAConfig) -> int:
        """K of an optimizer step, counted from 0, of a run that trains with ``rule``."""

    @abstractmethod
    def check(self, rule: LRSAConfig) -> None:
        """Raise a UserError if some step would have a K that the rule cannot have."""


@dataclass(frozen=True)
class SampledTopK(TopKSchedule):
    """Another K in each step, drawn from some: one model for all of them.

    Args:
        choices: at least one; each is as likely as the others, and one that stands twice twice as likely.
    """

    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        """Make the tuple that YAML cannot write."""
        object.__setattr__(self, "choices", tuple(self.choices))
        if not self.choices:
            raise UserError("choices", self.choices, "a list of at least one K")

    def __call__(self, seed: int, step: int, rule: LRSAConfig) -> int:
        """One of the choices."""
        return random.Random(f"{seed}:{step}:top_k").choice(self.choices)

    def check(self, rule: LRSAConfig) -> None:
        """Each must lie in [0, L]."""
        for top_k in self.choices:
            _check_top_k("choices", rule, top_k)


@dataclass(frozen=True)
class AnnealedTopK(TopKSchedule):
    """K falls linearly from one value to the rule's own, and stays there.

    Args:
        steps: after these K is the rule's own.
        start: K of the first step; null is lag_size, which drops nothing.
    """

    steps: int
    start: int | None = None

    def __post_init__(self) -> None:
        """Check the bound once."""
        if self.steps < 1:
            raise UserError("steps", self.steps, "an integer >= 1")

    def __call__(self, seed: int, step: int, rule: LRSAConfig) -> int:
        """Rounded to whole pairs."""
        start = rule.lag_size if self.start is None else self.start
        return round(start + (rule.top_k - start) * min(step / self.steps, 1.0))

    def check(self, rule: LRSAConfig) -> None:
        """The start must lie in [0, L]."""
        _check_top_k("start", rule, self(0, 0, rule))


def check_schedule(schedule: TopKSchedule | None, rule: LRSAConfig | None) -> None:
    """Refuse a schedule that a run which trains with a rule (None is dense) does not read, or cannot follow."""
    if schedule is None:
        return
    if rule is None:
        raise UserError("train_top_k", reason="it is not allowed where train_attention is null (dense)")
    for name, has in (("head_top_k", "K of each layer"), ("system", "no K")):
        if getattr(rule, name) is not None:
            raise UserError("train_top_k", reason=f"it is not allowed beside {name}, which has {has}")
    schedule.check(rule)


def _check_top_k(name: str, rule: LRSAConfig, top_k: int) -> None:
    try:
        rule.replace(top_k=top_k)
    except UserError as error:
        raise UserError(name, top_k, error.allowed) from None
