"""What an answer will hold of its past, before anything is read: a closed form of its length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lrsa_lit.attention import LRSAConfig, cache_share, head_of
from lrsa_lit.attention.budgets import heads_of
from lrsa_lit.ops.sparse_attention import spans


class PastBytes:
    """Bytes that a row holds at most while it reads and answers so many tokens in all.

    Args:
        config: the rule; systems have no such form.
        model_config: the model's.
        itemsize: bytes of a number in the cache.
    """

    def __init__(self, config: LRSAConfig, model_config: Any, itemsize: int) -> None:
        text = model_config.get_text_config()
        self._config, self._layers, self._heads = config, text.num_hidden_layers, heads_of(model_config)
        self._head = head_of(text, itemsize)

    def most(self, tokens: int) -> int:
        """The most bytes of a row while ``tokens`` are taken in."""
        rule = self._config.rule
        # Fullest it is where something is about to be compressed, or at the end; chunks that do not fit the partitions
        # make these peaks uneven, which repeats itself after L chunks.
        period = math.lcm(rule.lag_size, rule.chunk)
        first = max(0, tokens - tokens % period - 2 * period - rule.sink_size - 2 * rule.lag_size)
        ends = {tokens, *(span.stop for span in spans(first, tokens, rule))}
        # Buffers have spare rows.
        return max(map(self._at, ends)) * 33 // 32

    def together(self, lengths: Sequence[int], places: int | None = None) -> int:
        """The most bytes of rows of these lengths: as much as each needs, or where there are places, of the longest."""
        if places is None or not lengths:
            return sum(map(self.most, lengths))
        return places * self.most(1 << (max(lengths) - 1).bit_length())

    def _at(self, tokens: int) -> int:
        dense = tokens * self._head.pair * self._layers * self._heads
        return math.ceil(cache_share(self._config, tokens, self._layers, self._head) * dense) if tokens else 0
