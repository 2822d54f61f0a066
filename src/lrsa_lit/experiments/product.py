"""A product of what holds less: a filter of contexts, a model of low rank and an attention, set to one budget.

Each factor takes a share of the bytes that the ones before it leave, so the shares of a product multiply to the bytes
that are held at the end of the prompt, over those that a dense cache holds of the prompt before it was shortened.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from lrsa_lit.attention import LRSAConfig, at_budget
from lrsa_lit.data.filters import Budgeted, ContextFilter
from lrsa_lit.errors import UserError
from lrsa_lit.models.low_rank import LowRank
from lrsa_lit.systems.system import Head

Part = TypeVar("Part", ContextFilter, LowRank, LRSAConfig)
_CLOSE = 1e-9


@dataclass(frozen=True)
class Factor(Generic[Part]):
    """One factor.

    Attributes:
        label: its name in tables.
        part: what it is, not yet of its size.
        share: of the bytes that it leaves; None for what is left of a budget.
    """

    label: str
    part: Part
    share: float | None = None

    @property
    def words(self) -> str:
        """The label, with the share that is fixed."""
        return self.label if self.share is None else f"{self.label} to {100 * self.share:g}%"


class Sized(NamedTuple):
    """A product at a budget, or what has none.

    Attributes:
        shortens: the filter of the data set; None without one.
        narrow: the low rank of the model; None without one.
        attention: the inference; None is dense.
    """

    shortens: ContextFilter | None
    narrow: LowRank | None
    attention: LRSAConfig | None


@dataclass(frozen=True)
class Product:
    """At most one factor of each kind, one of which has no share.

    Attributes:
        text: as it was asked for.
        rule: the rule that holds everything where there is no attention but a low rank.
    """

    text: str
    rule: LRSAConfig
    shortens: Factor[ContextFilter] | None = None
    narrow: Factor[LowRank] | None = None
    attention: Factor[LRSAConfig] | None = None

    @property
    def factors(self) -> list[Factor[Any]]:
        """Those that there are, in the order in which they work."""
        return [each for each in (self.shortens, self.narrow, self.attention) if each is not None]

    @property
    def words(self) -> str:
        """Its name in tables: ``BM25 to 50%, then rule-LagRelative``."""
        return ", then ".join(factor.words for factor in self.factors)

    @property
    def name(self) -> str:
        """Its name among attentions, which metrics can have: ``BM25_to_50_then_rule-LagRelative``."""
        return re.sub(r"[^\w.-]+", "_", self.words)

    @property
    def attends_alone(self) -> bool:
        """Whether it is an attention and nothing else."""
        return self.attention is not None and len(self.factors) == 1

    @property
    def has_budget(self) -> bool:
        """Whether something sets its size; a product must have one that does."""
        if len(self.factors) > 1:
            return True
        if self.shortens is not None:
            return isinstance(self.shortens.part, Budgeted)
        return self.narrow is not None or self._system is None or bool(self._system.budget_field)

    @property
    def asked_for(self) -> Sized:
        """What has no budget, as it was asked for."""
        shortens, attention = self.shortens, self.attention
        return Sized(None if shortens is None else shortens.part, None, None if attention is None else attention.part)

    def at(self, budget: float, tokens: int, config: Any, head: Head) -> Sized:
        """The largest sizes at which no more is held than a share of a dense cache.

        Args:
            budget: the share, of a prompt of so many tokens that nothing has shortened.
            tokens: of that prompt.
            config: of the text model.
            head: of its key-value heads.

        Raises:
            UserError: the fixed shares take the budget alone, or a factor cannot be so small.
        """
        rest = self._rest(budget)
        shortens, narrow, attention, left = None, None, None, 1.0
        if self.shortens is not None:
            left = self.shortens.share or rest
            shortens = _shortened(self.shortens.part, left)
        if self.narrow is not None:
            narrow = _narrowed(self.narrow.part, self.narrow.share or rest, config, head)
            head = dataclasses.replace(head, latent=narrow.latent_bytes(config, head.itemsize))
            attention = self.rule.replace(top_k=self.rule.lag_size, latents=True)
        if self.attention is not None:
            fewer = math.floor(left * tokens + _CLOSE)
            wanted = self.attention.part if narrow is None else self.attention.part.replace(latents=True)
            if (share := self.attention.share) is None:
                # What rounding of the other factors leaves is its own.
                allowed = budget * tokens / max(fewer, 1)
            else:
                allowed = share * (1.0 if head.latent is None or narrow is None else head.latent / head.pair)
            attention = at_budget(wanted, min(allowed, 1.0), fewer, config.num_hidden_layers, head)
        return Sized(shortens, narrow, attention)

    def _rest(self, budget: float) -> float:
        """The share of the factor that has none of its own."""
        fixed = math.prod(factor.share for factor in self.factors if factor.share is not None)
        if len(self.factors) > 1 and budget >= fixed * (1 - _CLOSE):
            free = next(factor.label for factor in self.factors if factor.share is None)
            reason = f"holds no more than {fixed:g} without {free}, to which the budget {budget:g} leaves nothing"
            raise UserError("--systems", self.text, reason=reason, hint="give larger shares, or smaller budgets")
        return budget / fixed

    @property
    def _system(self) -> Any:
        return self.attention and self.attention.part.system


def _shortened(shortens: ContextFilter, share: float) -> ContextFilter:
    """The filter that leaves a share of each whole prompt, rounded down to tokens."""
    assert isinstance(shortens, Budgeted)
    return dataclasses.replace(shortens, kept=share, tokens=None, of="prompt")


def _narrowed(narrow: LowRank, share: float, config: Any, head: Head) -> LowRank:
    """The largest rank whose latents, positions among them, are no more than a share of keys and values."""

    def held(rank: int) -> float:
        return dataclasses.replace(narrow, rank=rank).latent_bytes(config, head.itemsize)

    ranks = range(1, min(narrow.width(config), int(config.hidden_size)) + 1)
    count = bisect.bisect_right(ranks, share * head.pair + 1e-6, key=held)
    if not count:
        lowest = math.ceil(1e4 * held(1) / head.pair - 1e-6) / 1e4
        raise UserError("budget", share, f"at least {lowest:.4f} for latents of rank 1 and their positions")
    return dataclasses.replace(narrow, rank=ranks[count - 1])
