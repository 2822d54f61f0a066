"""The measured cost of attention: cache bytes, query-key pairs and seconds, compared with dense attention."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Measured(NamedTuple):
    """The cost of a row's past, or the sum over several rows, in one layer or in all.

    Attributes:
        held: bytes held: keys and values (including sinks and windows) and everything that waits for a compression.
            Only filled memory counts, not the memory that a decoder allocates for later tokens.
        peak: the most bytes held at any time if the streams record it, else the bytes held now.
        read: bytes that a token of the answer reads: ``held``, unless a system looks up what to read.
        dense: bytes of a dense cache of the same tokens.
        pairs: query-key pairs that a head has computed for these tokens.
        dense_pairs: query-key pairs of dense causal attention.
        stored: key-value pairs that a head holds; the mean if heads differ.
        tokens: tokens seen.
        source: tokens of the prompt before a filter shortened it; else ``tokens``.
    """

    held: float
    peak: float
    read: float
    dense: int
    pairs: float
    dense_pairs: int
    stored: float
    tokens: int
    source: int

    def shortened(self, source: int, own: int) -> Measured:
        """The same, compared with a dense cache of a longer prompt: a filter left ``own`` of its ``source`` tokens."""
        pairs = self.dense_pairs * (source * (source + 1)) // (own * (own + 1))
        return self._replace(dense=self.dense * source // own, dense_pairs=pairs, source=self.source * source // own)


class Usage(NamedTuple):
    """The cost of answering a batch of prompts.

    Attributes:
        rows: the cost of each row at the end of its prompt, after systems have selected from it. ``read`` however is of
            the answer's tokens. ``peak`` is the maximum after any call of the prefill and at the end of the prompt; it
            includes the middle of a call if a system rewrites its memory or repeats the prompt.
        first_token: seconds from the prompts to the first tokens of all answers.
        token: seconds per further token; None if there was none.
    """

    rows: list[Measured]
    first_token: float
    token: float | None


def total(parts: Sequence[Measured]) -> Measured:
    """The field-wise sum of ``parts``."""
    return Measured(*map(sum, zip(*parts, strict=True)))  # type: ignore[arg-type]


def shares(usages: Sequence[Usage]) -> dict[str, float]:
    """The total cost of batches: bytes and pairs as shares of dense attention, and medians of the seconds.

    Returns:
        ``cache``, ``peak``, ``read`` (only if it differs from ``cache``), ``pairs``, ``first_token_seconds`` and
        ``token_seconds`` (NaN without a second token). Seconds depend on the batch size. ``kept`` is the share of the
        key-value pairs that are held; other stored data does not count. ``left`` is the share of the tokens that a
        filter left. All shares are relative to the prompts before a filter shortened them.
    """
    prompts = total([row for usage in usages for row in usage.rows])
    bytes_of = {"cache": prompts.held, "peak": prompts.peak, "read": prompts.read}
    if prompts.read == prompts.held:
        del bytes_of["read"]
    tokens = [usage.token for usage in usages if usage.token is not None]
    return {name: value / prompts.dense for name, value in bytes_of.items()} | {
        "kept": prompts.stored / prompts.source,
        "left": prompts.tokens / prompts.source,
        "pairs": prompts.pairs / prompts.dense_pairs,
        "first_token_seconds": statistics.median(usage.first_token for usage in usages),
        "token_seconds": statistics.median(tokens) if tokens else float("nan"),
    }
