"""The cache size of an answer, computed in closed form from its length before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lrsa_lit.attention import LRSAConfig, cache_share, head_of
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.ops.sparse_attention import spans


class PastBytes:
    """The most bytes that the cache of a row uses, from its number of tokens.

    Args:
        config: the rule. Systems are not supported, because their size is not a closed form of the length.
        model_config: the model's config.
        itemsize: bytes per number in the cache.
    """

    def __init__(self, config: LRSAConfig, model_config: Any, itemsize: int) -> None:
        text = model_config.get_text_config()
        self._config, self._layers, self._heads = config, text.num_hidden_layers, heads_of(model_config)
        self._head = head_of(text, itemsize)

    def most(self, tokens: int) -> int:
        """The most bytes of a row at any time while ``tokens`` are fed to it."""
        rule = self._config.rule
        # A row is largest just before a compression, or at the end. If C does not divide L, these peaks differ; they
        # repeat with the period lcm(L, C), so the last two periods are enough.
        period = math.lcm(rule.lag_size, rule.chunk)
        first = max(0, tokens - tokens % period - 2 * period - rule.sink_size - 2 * rule.lag_size)
        ends = {tokens, *(span.stop for span in spans(first, tokens, rule))}
        # Growing buffers allocate 1/32 more than they need.
        return max(map(self._at, ends)) * 33 // 32

    def together(self, lengths: Sequence[int], places: int | None = None) -> int:
        """The most bytes of rows with these lengths. With ``places``, each place has the memory of the longest row."""
        if places is None or not lengths:
            return sum(map(self.most, lengths))
        return places * self.most(1 << (max(lengths) - 1).bit_length())

    def _at(self, tokens: int) -> int:
        dense = tokens * self._head.pair * self._layers * self._heads
        return math.ceil(cache_share(self._config, tokens, self._layers, self._head) * dense) if tokens else 0
