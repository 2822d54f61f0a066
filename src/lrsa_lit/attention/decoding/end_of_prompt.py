"""The end of a prompt, where systems select. Some of them first need the model to repeat the prompt.

Dimensions: B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrsa_lit.attention.attached import base_of, cache_argument
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.synced import most_of_all
from lrsa_lit.errors import UserError
from lrsa_lit.systems.system import Encode, Repeat


@torch.no_grad()
def end_prompt(
    model: Any,
    cache: LRSACache,
    prompts: Tensor,
    attention_mask: Tensor | None = None,
    *,
    encode: Encode | None = None,
    synced: bool = False,
    to_come: Sequence[int] | None = None,
) -> None:
    """Call :func:`repeat_prompt`, then :meth:`LRSACache.end_prompt`. The arguments are those of the former."""
    repeat_prompt(model, cache, prompts, attention_mask, encode=encode, synced=synced, to_come=to_come)
    cache.end_prompt(to_come)


@torch.no_grad()
def repeat_prompt(
    model: Any,
    cache: LRSACache,
    prompts: Tensor,
    attention_mask: Tensor | None = None,
    *,
    encode: Encode | None = None,
    synced: bool = False,
    to_come: Sequence[int] | None = None,
) -> None:
    """Let the model read the texts that the cache's system needs after a prompt, if any. Nothing is stored.

    Args:
        model: a model with LRSA enabled.
        cache: its cache, which holds the prompts and nothing else.
        prompts: (B, T) token ids.
        attention_mask: (B, T), 1 for real tokens; None if all are real.
        encode: returns the token ids of a text, without special tokens. Only systems that repeat prompts need it.
        synced: make equally many calls of the model in all processes, as sharded weights need.
        to_come: for each row, the tokens of the question that follows; None if none follow.

    Raises:
        UserError: the system refuses the prompt, or the texts exceed the model's maximum position.
    """
    system, streams = cache.config.system, cache.system_streams()
    if system is None or not system.repeats_prompt or not streams:
        return
    mask = torch.ones_like(prompts) if attention_mask is None else attention_mask
    of_rows = streams if len(streams) == len(prompts) else streams * len(prompts)
    given = zip(prompts.tolist(), mask.tolist(), strict=True)
    real = [[token for token, kept in zip(*row, strict=True) if kept == 1] for row in given]
    cutting = [system.cutting_before(tokens) for tokens in to_come or [0] * len(prompts)]
    repeats = [each.repeats(own, row, encode) for each, own, row in zip(cutting, of_rows, real, strict=True)]
    _check_positions(model, real, repeats)
    calls = max(map(len, repeats))
    if synced:
        calls = most_of_all(calls, prompts.device)
    with cache.probing():
        for call in range(calls):
            now = [row[call] if call < len(row) else None for row in repeats]
            for own, repeat in zip(of_rows, now, strict=True):
                if repeat is not None:
                    system.begin_repeat(own, repeat)
            _read(model, cache, mask, [[] if repeat is None else repeat.ids for repeat in now])


def _read(model: Any, cache: LRSACache, mask: Tensor, rows: Sequence[list[int]]) -> None:
    """One call with tokens after the prompts, padded on the right. Rows without tokens have pads only."""
    tokens = [torch.tensor(row or [0], device="cpu") for row in rows]
    real = [torch.full((len(row) or 1,), int(bool(row)), dtype=mask.dtype, device="cpu") for row in rows]
    # One copy of each: the host waits for every copy.
    ids, new = (pad_sequence(parts, batch_first=True).to(mask.device) for parts in (tokens, real))
    mask = torch.cat([mask, new], dim=1)
    model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))


def _check_positions(model: Any, prompts: Sequence[list[int]], repeats: Sequence[Sequence[Repeat]]) -> None:
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    for prompt, repeat in zip(prompts, repeats, strict=True):
        needed = len(prompt) + max((len(part.ids) for part in repeat), default=0)
        if limit is not None and needed > limit:
            reason = f"needs {needed} positions to repeat a prompt of {len(prompt)} tokens; the model has {limit}"
            raise UserError("system", reason=reason, hint="shorten the prompt, or the parts that are repeated")
