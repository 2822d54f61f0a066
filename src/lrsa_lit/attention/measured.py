"""What attention takes, measured: bytes of a cache, query-key pairs, and seconds, beside those of dense attention."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Measured(NamedTuple):
    """What the past of a row takes, or that of several in sum, in a layer or in all.

    Attributes:
        held: bytes that are held: keys and values, sinks and windows among them, and whatever waits for a compression;
            what is filled, not the room that a decoder makes for later tokens.
        peak: the most bytes that have been held at a time, as far as the streams say; else those held now.
        read: bytes that a token of the answer reads; those held, unless a system looks up what to read.
        dense: bytes that a dense cache holds of the same tokens.
        pairs: query-key pairs of a head that the tokens have attended to.
        dense_pairs: those of dense causal attention.
        stored: key-value pairs that a head holds, a mean where heads hold differently many.
        tokens: those that were seen.
        source: those that a dense cache holds: as many, or of a prompt that was shortened as many as it had before.
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
        """The same beside a dense cache of a longer prompt: of ``source`` tokens, ``own`` of which were left."""
        pairs = self.dense_pairs * (source * (source + 1)) // (own * (own + 1))
        return self._replace(dense=self.dense * source // own, dense_pairs=pairs, source=self.source * source // own)


class Usage(NamedTuple):
    """What answering a batch of prompts took.

    Attributes:
        rows: of each row at the end of its prompt, when systems have cut. But ``read`` is of the tokens behind it, and
            ``peak`` the most behind any call of the prefill and where it ends, or within one where a system rewrites
            its memory or has the prompt repeated.
        first_token: seconds from the prompts to the first tokens of all answers.
        token: seconds for each further token; None where there was none.
    """

    rows: list[Measured]
    first_token: float
    token: float | None


def total(parts: Sequence[Measured]) -> Measured:
    """The sums of some parts."""
    return Measured(*map(sum, zip(*parts, strict=True)))  # type: ignore[arg-type]


def shares(usages: Sequence[Usage]) -> dict[str, float]:
    """What batches took in all: bytes and pairs as shares of dense attention's, and medians of the seconds.

    Returns:
        ``cache``, ``peak`` and ``read`` (only where it is not ``cache``), ``pairs``, ``first_token_seconds`` and
        ``token_seconds`` (NaN without a second token). Seconds depend on the size of the batches. ``kept`` is the share
        of the key-value pairs that are held, whatever is held beside them, and ``left`` that of the tokens which a
        filter left. All shares are of the prompts before a filter shortened them.
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
