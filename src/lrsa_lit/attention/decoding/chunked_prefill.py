"""Feed a long text to a cache, call by call."""

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

    With LRSA attention, the length of the calls does not change the result. With stock attention and an
    :class:`LRSACache`, calls end where a compression is due.

    Args:
        model: a causal language model, with or without LRSA enabled.
        input_ids: (B, T) new tokens, which follow the tokens that the cache has seen.
        cache: any cache of transformers, compressed or not.
        attention_mask: (B, seen + T), 1 for real tokens, as for ``generate``; None if all are real.
        tokens_per_call: the most tokens per call. Systems that need the whole prompt get it in one call.
        progress: called after each call with the number of tokens fed so far.

    Returns:
        Logits (B, 1, V) of the last column.

    Raises:
        UserError: there are no tokens, or ``tokens_per_call`` is less than 1.
    """
    if input_ids.shape[1] == 0 or tokens_per_call < 1:
        reason = f"{input_ids.shape[1]} tokens, {tokens_per_call} per call; both must be >= 1"
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
    """[start, stop) in pieces of at most ``most`` tokens; with stock attention, none crosses a compression."""
    pieces = [(start, stop)]
    if isinstance(cache, LRSACache) and cache.config.system is not None and cache.config.system.needs_whole_prompt:
        most = stop - start
    if isinstance(cache, LRSACache) and enabled_state(base_of(model)) is None:
        pieces = [(span.start, span.stop) for span in spans(start, stop, cache.config.rule)]
    for first, last in pieces:
        for begin in range(first, last, most):
            yield begin, min(begin + most, last)
