"""Prompts into a cache, up to where their answers start; in a conversation systems cut behind the first turn.

Dimensions: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.chunked_prefill import TOKENS_PER_CALL, prefill
from lrsa_lit.attention.decoding.end_of_prompt import end_prompt
from lrsa_lit.attention.decoding.synced import most_of_all
from lrsa_lit.systems.system import Encode


@torch.no_grad()
def read_prompts(
    model: Any,
    cache: LRSACache,
    prompts: Tensor,
    attention_mask: Tensor | None = None,
    *,
    first_turns: Sequence[int] | None = None,
    encode: Encode | None = None,
    synced: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Take prompts in, and say where they end.

    Where a prompt is a conversation, it ends with its first turn: what systems make of the context does not depend on
    later questions, whose tokens, and those of earlier answers, are then taken in as those of an answer are.

    Args:
        model: with LRSA enabled.
        cache: empty.
        prompts: (B, T) token ids, padded on the left.
        attention_mask: (B, T), 1 for real tokens; None: all are real.
        first_turns: how many tokens of each prompt its first turn has; None: all.
        encode: as :func:`end_prompt` has it.
        synced: other processes must be called as often as this one.
        progress: as :func:`prefill` has it.

    Returns:
        Logits (B, 1, V) of the last token of each prompt, and the mask (B, columns) of what the cache has seen.
    """
    mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
    later, of_later = prompts[:, :0], mask[:, :0]
    lengths = mask.sum(dim=1).tolist() if first_turns is not None else []
    if first_turns is not None and lengths != list(first_turns):
        rows = [row[real == 1] for row, real in zip(prompts, mask, strict=True)]
        prompts, mask = _padded([row[:first] for row, first in zip(rows, first_turns, strict=True)])
        later, of_later = _padded([row[first:] for row, first in zip(rows, first_turns, strict=True)])
    # The prompts of other processes may need another number of calls.
    calls = prompts.shape[1] if synced else TOKENS_PER_CALL
    logits = prefill(model, prompts, cache, attention_mask=mask, tokens_per_call=calls, progress=progress)
    end_prompt(model, cache, prompts, mask, encode=encode, synced=synced)
    if synced and first_turns is not None:
        later, of_later = _as_long_as_any(later, of_later)
    if later.shape[1]:
        by_token = cache.config.system is not None and cache.config.system.answers_by_token
        seen = torch.cat([mask, of_later], dim=1)
        calls = 1 if by_token else later.shape[1]
        behind = prefill(model, later, cache, attention_mask=seen, tokens_per_call=calls, progress=progress)
        logits, mask = torch.where(of_later.any(dim=1)[:, None, None], behind, logits), seen
    return logits, mask


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (B, longest), padded on the left, and their mask."""
    ids, real = (
        pad_sequence(list(parts), batch_first=True, padding_side="left") for parts in (rows, map(torch.ones_like, rows))
    )
    return ids, real


def _as_long_as_any(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both padded on the left to the most columns that a process has."""
    missing = most_of_all(ids.shape[1], ids.device) - ids.shape[1]
    ids, mask = (torch.nn.functional.pad(each, (missing, 0)) for each in (ids, mask))
    return ids, mask
