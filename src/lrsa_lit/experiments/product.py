"""A product of methods that reduce the cache: a context filter, a low-rank model and an attention, with one budget.

Each factor keeps a share of the bytes that the factors before it leave. The shares therefore multiply to the bytes held
at the end of the prompt, relative to a dense cache of the unfiltered prompt.
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
    """One factor of a product.

    Attributes:
        label: name in tables.
        part: the filter, low rank or attention; :meth:`Product.at` sets its size.
        share: share of the bytes that the factor keeps; None for the rest of the budget.
    """

    label: str
    part: Part
    share: float | None = None

    @property
    def words(self) -> str:
        """The label, followed by the share if it is fixed."""
        return self.label if self.share is None else f"{self.label} to {100 * self.share:g}%"


class Sized(NamedTuple):
    """A product sized for a budget, or one without a budget.

    Attributes:
        shortens: the data set's filter; None without one.
        narrow: the model's low rank; None without one.
        attention: the inference attention; None is dense.
    """

    shortens: ContextFilter | None
    narrow: LowRank | None
    attention: LRSAConfig | None


@dataclass(frozen=True)
class Product:
    """At most one factor of each kind; one of them has no fixed share.

    Attributes:
        text: the text that asks for the product.
        rule: the rule that keeps all tokens if there is a low rank but no attention.
    """

    text: str
    rule: LRSAConfig
    shortens: Factor[ContextFilter] | None = None
    narrow: Factor[LowRank] | None = None
    attention: Factor[LRSAConfig] | None = None

    @property
    def factors(self) -> list[Factor[Any]]:
        """The factors that are set, in the order in which they are applied."""
        return [each for each in (self.shortens, self.narrow, self.attention) if each is not None]

    @property
    def words(self) -> str:
        """Name in tables: ``BM25 to 50%, then rule-LagRelative``."""
        return ", then ".join(factor.words for factor in self.factors)

    @property
    def name(self) -> str:
        """Name that is allowed in metric names: ``BM25_to_50_then_rule-LagRelative``."""
        return re.sub(r"[^\w.-]+", "_", self.words)

    @property
    def attends_alone(self) -> bool:
        """Whether the product is only an attention."""
        return self.attention is not None and len(self.factors) == 1

    @property
    def has_budget(self) -> bool:
        """Whether the product can be set to a budget; always true for several factors."""
        if len(self.factors) > 1:
            return True
        if self.shortens is not None:
            return isinstance(self.shortens.part, Budgeted)
        return self.narrow is not None or self._system is None or bool(self._system.budget_field)

    @property
    def asked_for(self) -> Sized:
        """A product without a budget, as it was asked for."""
        shortens, attention = self.shortens, self.attention
        return Sized(None if shortens is None else shortens.part, None, None if attention is None else attention.part)

    def at(self, budget: float, tokens: int, config: Any, head: Head) -> Sized:
        """The largest sizes at which at most ``budget`` of a dense cache is held.

        Args:
            budget: share of a dense cache of the unfiltered prompt.
            tokens: number of tokens of the unfiltered prompt.
            config: config of the text model.
            head: the model's key-value heads.

        Raises:
            UserError: the fixed shares alone already meet the budget, or a factor cannot be that small.
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
                # The attention may also use what rounding of the other factors leaves.
                allowed = budget * tokens / max(fewer, 1)
            else:
                allowed = share * (1.0 if head.latent is None or narrow is None else head.latent / head.pair)
            attention = at_budget(wanted, min(allowed, 1.0), fewer, config.num_hidden_layers, head)
        return Sized(shortens, narrow, attention)

    def _rest(self, budget: float) -> float:
        """The share of the factor without a fixed share."""
        fixed = math.prod(factor.share for factor in self.factors if factor.share is not None)
        if len(self.factors) > 1 and budget >= fixed * (1 - _CLOSE):
            free = next(factor.label for factor in self.factors if factor.share is None)
            reason = f"keeps only {fixed:g} without {free}, which then has nothing to save at the budget {budget:g}"
            raise UserError("--systems", self.text, reason=reason, hint="give larger shares, or smaller budgets")
        return budget / fixed

    @property
    def _system(self) -> Any:
        return self.attention and self.attention.part.system


def _shortened(shortens: ContextFilter, share: float) -> ContextFilter:
    """The filter with a budget of ``share`` of each whole prompt, rounded down to tokens."""
    assert isinstance(shortens, Budgeted)
    return dataclasses.replace(shortens, kept=share, tokens=None, of="prompt")


def _narrowed(narrow: LowRank, share: float, config: Any, head: Head) -> LowRank:
    """The low rank with the largest rank whose latents and positions take at most ``share`` of keys and values."""

    def held(rank: int) -> float:
        return dataclasses.replace(narrow, rank=rank).latent_bytes(config, head.itemsize)

    ranks = range(1, min(narrow.width(config), int(config.hidden_size)) + 1)
    count = bisect.bisect_right(ranks, share * head.pair + 1e-6, key=held)
    if not count:
        lowest = math.ceil(1e4 * held(1) / head.pair - 1e-6) / 1e4
        raise UserError("budget", share, f"at least {lowest:.4f} for latents of rank 1 and their positions")
    return dataclasses.replace(narrow, rank=ranks[count - 1])
