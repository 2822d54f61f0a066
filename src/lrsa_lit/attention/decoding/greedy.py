"""Greedy answers: the likeliest token each time, until one ends the answer.

Dimensions: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lrsa_lit.attention.attached import base_of, enabled_state
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.chunked_prefill import prefill
from lrsa_lit.attention.decoding.decoder import ROOM, Decoder
from lrsa_lit.attention.decoding.turns import read_prompts
from lrsa_lit.attention.measured import Measured, Usage
from lrsa_lit.systems.system import Encode

Step = Callable[[Tensor], Tensor]
"""Takes in one token per row, (B, 1), and returns logits (B, 1, V), which the next step may overwrite."""


class Greedy:
    """Answers to batch after batch of prompts, in the same memory, so that on CUDA few graphs serve them all.

    Args:
        model: a causal language model with LRSA enabled; the rule must stay the same.
        stops: the tokens that end an answer.
        max_new_tokens: most tokens of an answer.
        longest_prompt: its tokens, if known: memory for it is then made at once.
        synced: each forward needs other processes too (sharded weights), which must be called as often as this one; all
            go on until the last one has its answers.
        encode: as :func:`~lrsa_lit.attention.end_prompt` has it.

    Attributes:
        usage: what the last batch took, without the rows that a graph has twice.
    """

    def __init__(
        self,
        model: Any,
        stops: Container[int],
        *,
        max_new_tokens: int,
        longest_prompt: int = 0,
        synced: bool = False,
        encode: Encode | None = None,
    ) -> None:
        self.model, self._encode = model, encode
        self._stops, self._most, self._synced = stops, max_new_tokens, synced
        self._longest = longest_prompt + max_new_tokens if longest_prompt else 0
        self._graphed = base_of(model).device.type == "cuda" and not synced
        self._caches: dict[int, tuple[LRSACache, Step]] = {}
        self.usage: Usage | None = None

    @torch.no_grad()
    def __call__(
        self,
        prompts: Tensor,
        attention_mask: Tensor | None = None,
        first_turns: Sequence[int] | None = None,
        contexts: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt (B, T), without the one that ends the answer.

        Prompts of unequal lengths are padded on the left; the mask (B, T) is 1 for real tokens, one or more a prompt.
        How many tokens of each are its first turn and its context is as :func:`read_prompts` has it: systems cut there.
        """
        rows, began = len(prompts), time.perf_counter()
        if self._graphed:
            # A graph is for a number of rows: the next power of two, with rows that are there twice.
            order = [row % rows for row in range(1 << (rows - 1).bit_length())]
            prompts = prompts[order]
            attention_mask = None if attention_mask is None else attention_mask[order]
            first_turns, contexts = (each and [each[row] for row in order] for each in (first_turns, contexts))
        cache, step = self._cache_for(len(prompts))
        peaks: list[list[float]] = []
        logits, _ = read_prompts(
            self.model,
            cache,
            prompts,
            attention_mask,
            contexts=contexts,
            first_turns=first_turns,
            encode=self._encode,
            synced=self._synced,
            progress=lambda _: peaks.append([row.peak for row in cache.measured(rows)]),
        )
        behind, at, steps = cache.measured(rows), [], []
        for values in greedy_tokens(logits, step, self._stops, most=self._most, synced=self._synced):
            steps.append(values)
            at.append(time.perf_counter())
        found = zip(behind, cache.measured(rows), zip(*peaks, strict=True), strict=True)
        measured = [_of_answer(row, answer)._replace(peak=max(row.peak, *peak)) for row, answer, peak in found]
        token = (at[-1] - at[0]) / (len(at) - 1) if len(at) > 1 else None
        self.usage = Usage(measured, at[0] - began, token)
        tokens = list(zip(*steps, strict=True))[:rows]
        return [list(itertools.takewhile(lambda token: token not in self._stops, answer)) for answer in tokens]

    def _cache_for(self, rows: int) -> tuple[LRSACache, Step]:
        """An empty cache for so many rows, and what takes in their next tokens."""
        if rows not in self._caches:
            cache = LRSACache.of(self.model)
            if self._synced:
                step = _plain_steps(self.model, cache)
            else:
                step = single_token_steps(self.model, cache, room=self._most, longest=self._longest)
            self._caches[rows] = cache, step
        cache, step = self._caches[rows]
        cache.reset()
        return cache, step


def _of_answer(prompt: Measured, answer: Measured) -> Measured:
    """What a row took at the end of its prompt, with the share of it that the answer's tokens read."""
    looked_up = answer.read != answer.held
    return prompt._replace(read=answer.read * prompt.dense / answer.dense) if looked_up else prompt


def single_token_steps(model: Any, cache: Any, *, room: int = ROOM, longest: int = 0) -> Step:
    """The fastest way to take in one token per row, none of which is empty, where the cache stands.

    Model and cache may be any of transformers; ``room`` and ``longest`` are as in :class:`Decoder`.
    """
    inner = base_of(model)
    if inner.device.type == "cuda" and isinstance(cache, LRSACache) and cache.graphable and enabled_state(inner):
        return Decoder(inner, cache, room=room, longest=longest).step
    return _plain_steps(model, cache)


def _plain_steps(model: Any, cache: Any) -> Step:
    return lambda tokens: prefill(model, tokens, cache)


@torch.no_grad()
def greedy_tokens(
    logits: Tensor, step: Step, stops: Container[int], *, most: int, synced: bool = False
) -> Iterator[list[int]]:
    """The next token of each row, at most ``most``, until every row has had one that ends its answer.

    Args:
        logits: (B, 1, V), of the prompts' last tokens.
        step: what takes tokens in, such as :func:`single_token_steps`.
        stops: the tokens that end an answer; a row goes on behind it while others have none.
        most: tokens of each row.
        synced: go on until the rows of all processes have ended.
    """
    ended: set[int] = set()
    for count in range(1, most + 1):
        tokens = logits[:, -1].argmax(dim=-1)
        values: list[int] = tokens.tolist()
        yield values
        ended |= {row for row, token in enumerate(values) if token in stops}
        unfinished = len(values) - len(ended)
        if synced and count < most:
            everywhere = torch.tensor(unfinished, device=tokens.device)
            torch.distributed.all_reduce(everywhere)
            unfinished = int(everywhere)
        if count == most or not unfinished:
            return
        logits = step(tokens[:, None])
