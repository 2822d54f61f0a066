"""Take a long text in, call by call, into a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention.attached import base_of, cache_argument, enabled_state
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import spans

TOKENS_PER_CALL = 8192


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    *,
    attention_mask: Tensor | None = None,
    tokens_per_call: int = TOKENS_PER_CALL,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Feed tokens to a cache in calls of bounded length, so that memory does not grow with the text.

    With LRSA attention the length of the calls changes nothing. With stock attention and an :class:`LRSACache` no call
    reaches over a compression.

    Args:
        model: a causal language model, LRSA enabled or not.
        input_ids: (B, T) new tokens, behind those that the cache has seen.
        cache: any of transformers, compressed or not.
        attention_mask: (B, seen + T), 1 for real tokens, as ``generate`` takes it; None: all are real.
        tokens_per_call: most tokens of a call; a system that needs whole prompts gets them.
        progress: called after each call with the tokens taken in so far.

    Returns:
        Logits (B, 1, V) of the last column.

    Raises:
        UserError: nothing to feed, or a length that is not positive.
    """
    if input_ids.shape[1] == 0 or tokens_per_call < 1:
        reason = f"{input_ids.shape[1]} tokens by {tokens_per_call}; both must be >= 1"
        raise UserError("input_ids, tokens_per_call", reason=reason)
    seen, logits = int(cache.get_seq_length()), input_ids.new_empty(0)
    for start, stop in _calls(model, cache, seen, seen + input_ids.shape[1], tokens_per_call):
        mask = None if attention_mask is None else attention_mask[:, :stop]
        given = {"input_ids": input_ids[:, start - seen : stop - seen], "attention_mask": mask}
        output = model(**given, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
        logits = output.logits[:, -1:]
        if progress is not None:
            progress(stop - seen)
    return logits


def _calls(model: Any, cache: Any, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in pieces of at most ``most``; where attention is the model's own, none over a compression."""
    pieces = [(start, stop)]
    if isinstance(cache, LRSACache) and cache.config.system is not None and cache.config.system.needs_whole_prompt:
        most = stop - start
    if isinstance(cache, LRSACache) and enabled_state(base_of(model)) is None:
        pieces = [(span.start, span.stop) for span in spans(start, stop, cache.config.rule)]
    for first, last in pieces:
        for begin in range(first, last, most):
            yield begin, min(begin + most, last)
