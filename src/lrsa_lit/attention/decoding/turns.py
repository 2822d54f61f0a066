"""Feed prompts to a cache. Systems select after the context, or after the first question.

Dimensions: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
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
    contexts: Sequence[int] | None = None,
    first_turns: Sequence[int] | None = None,
    encode: Encode | None = None,
    synced: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Feed prompts to a cache, and call :func:`end_prompt` where they end for a system.

    For a system that must not see the question (see :attr:`System.question`), a prompt ends after its context; for
    other systems, after the first turn of a conversation. So what they keep does not depend on the question, or on
    later turns. The question is then fed in one call; so are later turns, unless the system needs answers token by
    token (:attr:`System.answers_by_token`).

    Args:
        model: a model with LRSA enabled.
        cache: its empty cache.
        prompts: (B, T) token ids, padded on the left.
        attention_mask: (B, T), 1 for real tokens; None if all are real.
        contexts: for each prompt, the tokens of its context, 1 or more; None means the whole first turn.
        first_turns: for each prompt, the tokens of its first turn; None means the whole prompt.
        encode: as in :func:`end_prompt`.
        synced: make equally many calls of the model in all processes, as sharded weights need.
        progress: called after each call, with the number of tokens as in :func:`prefill`.

    Returns:
        Logits (B, 1, V) of the last token of each prompt, and the mask (B, columns) of the columns that the cache has
        seen.
    """
    system = cache.config.system
    mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
    by_token = system is not None and system.answers_by_token
    if system is None or system.question:
        contexts = None
    elif contexts is not None and first_turns is not None:
        contexts = list(map(min, contexts, first_turns))
    ends = [each for each in (contexts, first_turns) if each is not None]
    (prompts, seen), *later = _pieces(prompts, mask, ends)
    to_come = None
    if contexts is not None:
        turns = mask.sum(dim=1).tolist() if first_turns is None else first_turns
        to_come = [turn - context for turn, context in zip(turns, contexts, strict=True)]
    # Prompts of other processes may have other lengths; one call each keeps the number of calls equal.
    calls = prompts.shape[1] if synced else TOKENS_PER_CALL
    logits = prefill(model, prompts, cache, attention_mask=seen, tokens_per_call=calls, progress=progress)
    end_prompt(model, cache, prompts, seen, encode=encode, synced=synced, to_come=to_come)
    for number, (ids, real) in enumerate(later):
        ids, real = _as_long_as_any(ids, real) if synced else (ids, real)
        if ids.shape[1]:
            seen = torch.cat([seen, real], dim=1)
            is_question = contexts is not None and number == 0
            calls = 1 if by_token and not is_question else ids.shape[1]
            behind = prefill(model, ids, cache, attention_mask=seen, tokens_per_call=calls, progress=progress)
            logits = torch.where(real.any(dim=1)[:, None, None], behind, logits)
    return logits, seen


def _pieces(ids: Tensor, mask: Tensor, ends: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Split rows (B, T) at each of ``ends``, which are counted in real tokens; returns each piece with its mask."""
    if not ends:
        return [(ids, mask)]
    lengths = mask.sum(dim=1).tolist()
    if all(list(each) == lengths for each in ends):
        return [(ids, mask), *[(ids[:, :0], mask[:, :0]) for _ in ends]]
    # Real tokens first. A bool index of each row would make the host wait for a GPU.
    order = (mask != 1).sort(dim=1, stable=True).indices
    rows = [row[:length] for row, length in zip(ids.gather(1, order), lengths, strict=True)]
    bounds = [[0] * len(rows), *ends, lengths]
    return [
        left_padded([row[start:stop] for row, start, stop in zip(rows, starts, stops, strict=True)])
        for starts, stops in itertools.pairwise(bounds)
    ]


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (B, longest), padded on the left, and their mask."""
    ids, real = (
        pad_sequence(list(parts), batch_first=True, padding_side="left") for parts in (rows, map(torch.ones_like, rows))
    )
    return ids, real


def _as_long_as_any(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pad both on the left to the largest number of columns in any process."""
    missing = most_of_all(ids.shape[1], ids.device) - ids.shape[1]
    ids, mask = (torch.nn.functional.pad(each, (missing, 0)) for each in (ids, mask))
    return ids, mask
