"""Greedy answers: the most likely token at each step, until a stop token.

Dimensions: B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
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
"""Feeds one token per row, (B, 1), and returns logits (B, 1, V), which the next step may overwrite."""

Behind = Callable[[LRSACache, Tensor, Tensor], None]
"""Takes a cache behind prompts, which it may continue, and what :func:`read_prompts` returns."""


class Greedy:
    """Answer batches of prompts in the same memory, so that a few CUDA graphs serve all of them.

    Args:
        model: a causal language model with LRSA enabled. The rule must not change.
        stops: the tokens that end an answer.
        max_new_tokens: the most tokens per answer.
        longest_prompt: the length of the longest prompt in tokens, if known. Its memory is then allocated at once.
        synced: make equally many calls of the model in all processes, as sharded weights need. All continue until the
            last process has its answers.
        encode: as in :func:`~lrsa_lit.attention.end_prompt`.

    Attributes:
        usage: the cost of the last batch, without the rows that were repeated for a graph.
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
        behind: Behind | None = None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt (B, T), without the one that ends the answer.

        Args:
            prompts: (B, T) token ids, padded on the left.
            attention_mask: (B, T), 1 for real tokens, at least one per prompt; None if all are real.
            first_turns: as in :func:`read_prompts`; systems select there.
            contexts: as in :func:`read_prompts`; systems select there.
            behind: called once, with a copy of the cache where the prompts end. It must wait for the device, because
                its time is not part of the usage.
        """
        rows, began = len(prompts), time.perf_counter()
        if self._graphed:
            # A graph has a fixed number of rows: the next power of two. Repeated rows fill it up.
            order = [row % rows for row in range(1 << (rows - 1).bit_length())]
            prompts = prompts[order]
            attention_mask = None if attention_mask is None else attention_mask[order]
            first_turns, contexts = (each and [each[row] for row in order] for each in (first_turns, contexts))
        cache, step = self._cache_for(len(prompts))
        peaks: list[list[float]] = []
        logits, seen = read_prompts(
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
        read, at, steps = cache.measured(rows), [], []
        paused = 0.0
        for values in greedy_tokens(logits, step, self._stops, most=self._most, synced=self._synced):
            steps.append(values)
            at.append(time.perf_counter())
            if behind is not None and len(steps) == 1:
                behind(_copy(cache, range(rows), of=len(prompts)), logits[:rows], seen[:rows])
                paused = time.perf_counter() - at[0]
        found = zip(read, cache.measured(rows), zip(*peaks, strict=True), strict=True)
        measured = [_of_answer(row, answer)._replace(peak=max(row.peak, *peak)) for row, answer, peak in found]
        token = (at[-1] - at[0] - paused) / (len(at) - 1) if len(at) > 1 else None
        self.usage = Usage(measured, at[0] - began, token)
        tokens = list(zip(*steps, strict=True))[:rows]
        return [list(itertools.takewhile(lambda token: token not in self._stops, answer)) for answer in tokens]

    def _cache_for(self, rows: int) -> tuple[LRSACache, Step]:
        """An empty cache for ``rows`` rows, and the function that feeds their next tokens."""
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


def _copy(cache: LRSACache, rows: Sequence[int], *, of: int) -> LRSACache:
    """A copy of some rows of a cache ``of`` so many."""
    own = copy.deepcopy(cache)
    if len(rows) < of:
        own.batch_select_indices(torch.tensor(rows))
    return own


def _of_answer(prompt: Measured, answer: Measured) -> Measured:
    """The cost of a row at the end of its prompt, with ``read`` scaled from the end of the answer."""
    looked_up = answer.read != answer.held
    return prompt._replace(read=answer.read * prompt.dense / answer.dense) if looked_up else prompt


def single_token_steps(model: Any, cache: Any, *, room: int = ROOM, longest: int = 0) -> Step:
    """The fastest step function for this cache, whose rows must not be empty.

    Any model and cache of transformers are allowed; ``room`` and ``longest`` are as in :class:`Decoder`.
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
    """Generate the next token of each row, at most ``most`` times, until every row has had a stop token.

    Args:
        logits: (B, 1, V), of the prompts' last tokens.
        step: feeds tokens to the model, for example the result of :func:`single_token_steps`.
        stops: the tokens that end an answer. A row continues after its stop token while other rows have none.
        most: the most tokens per row.
        synced: continue until the rows of all processes have ended.

    Yields:
        The token of each row.
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
