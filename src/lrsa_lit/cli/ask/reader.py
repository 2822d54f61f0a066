"""A reader that feeds a text to a model, call by call, and answers questions from the cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.models.generation import stop_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

_TOKENS_PER_CALL = {"cpu": 1024, "accelerator": 8192}
"""Chosen so that the progress bar moves about once a second."""
_ROOM = 1024
"""Maximum number of new tokens that a CUDA graph allocates memory for at a time."""


@dataclass(frozen=True)
class Answer:
    """An answer and its cost: one line of ``--json``.

    Attributes:
        question: as asked.
        answer: without surrounding white space.
        tokens_seen: tokens so far: the text, all questions and all answers, except the last generated token.
        tokens_restored: those of them that came from a saved cache; the model read only the others.
        tokens_kept: tokens that are stored per head, averaged over the layers.
        seconds_to_first_token: since the question was asked; for the first question, reading the text is included.
        seconds: the same up to the last token.
    """

    question: str
    answer: str
    tokens_seen: int
    tokens_restored: int
    tokens_kept: int
    seconds_to_first_token: float
    seconds: float

    def summary(self) -> str:
        """Tokens restored, read and kept, in one line."""
        share, read = 100 * self.tokens_kept / self.tokens_seen, self.tokens_seen - self.tokens_restored
        counted = f"{self.tokens_restored:,} tokens restored, {read:,}" if self.tokens_restored else f"{read:,} tokens"
        return f"{counted} read, {self.tokens_kept:,} kept per head ({share:.0f} %)"


@dataclass
class Reader:
    """Reads a dialogue's text into an empty cache and answers questions from it, or from a cache that holds the text.

    The model is in evaluation mode, with LRSA enabled if the cache is a compressed one.
    """

    model: PreTrainedModel
    cache: Cache
    tokenizer: PreTrainedTokenizerBase
    dialogue: Dialogue
    max_new_tokens: int
    _reading: float = 0.0

    def __post_init__(self) -> None:
        """Prepare the decoding steps, and count the tokens of a restored cache."""
        from lrsa_lit.attention import single_token_steps

        self._restored = int(self.cache.get_seq_length())
        self._step = single_token_steps(self.model, self.cache, room=min(self.max_new_tokens, _ROOM))

    def read(self, console: Console) -> None:
        """Read the text into the cache, with a progress bar."""
        started = time.perf_counter()
        read = TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens{task.fields[rate]}")
        with Progress(TextColumn("reading"), BarColumn(), read, console=console) as progress:
            task = progress.add_task("", total=len(self.dialogue.ids), rate="")

            def show(count: int) -> None:
                rate = count / (time.perf_counter() - started)
                progress.update(task, completed=count, rate=f", {rate:,.0f} tokens/s")

            if self.dialogue.ids:
                self._feed(self.dialogue.ids, show)
                self._end_prompt(behind_question=False)
        self._reading = time.perf_counter() - started

    def answer(self, question: str, *, show: bool) -> Answer:
        """Answer a question greedily, up to the first special token; ``show`` prints while it is generated."""
        import torch
        from transformers import TextStreamer

        from lrsa_lit.attention import greedy_tokens

        started, self._reading = time.perf_counter() - self._reading, 0.0
        self.dialogue.ask(question)
        logits = self._feed(self.dialogue.ids[self.cache.get_seq_length() :])
        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True) if show else None
        new: list[int] = []
        self._end_prompt(behind_question=True)
        first = 0.0
        for (token,) in greedy_tokens(logits, self._step, stop_tokens(self.tokenizer), most=self.max_new_tokens):
            first = first or time.perf_counter()
            new.append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        ended = time.perf_counter()
        self.dialogue.take(new)
        return Answer(
            question=question,
            answer=str(self.tokenizer.decode(new, skip_special_tokens=True)).strip(),
            tokens_seen=self.cache.get_seq_length(),
            tokens_restored=self._restored,
            tokens_kept=kept_tokens(self.cache),
            seconds_to_first_token=round(first - started, 3),
            seconds=round(ended - started, 3),
        )

    def _end_prompt(self, *, behind_question: bool) -> None:
        """Tell a system that its prompt has ended; a system that has already cut does not cut again."""
        import torch

        from lrsa_lit.attention import LRSACache, end_prompt

        if not isinstance(self.cache, LRSACache) or (system := self.cache.config.system) is None:
            return
        if behind_question or not system.question:
            prompt = torch.tensor([self.dialogue.ids], device=self.model.device)
            encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
            end_prompt(self.model, self.cache, prompt, encode=encode)

    def _feed(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> torch.Tensor:
        """Feed one or more tokens in calls of bounded length; returns the logits (1, 1, V) of the last one."""
        import torch

        from lrsa_lit.attention import prefill

        calls = _TOKENS_PER_CALL["cpu" if self.model.device.type == "cpu" else "accelerator"]
        tokens = torch.tensor([ids], device=self.model.device)
        return prefill(self.model, tokens, self.cache, tokens_per_call=calls, progress=progress)


def kept_tokens(cache: Cache) -> int:
    """Tokens that a cache of one row stores per head, averaged over the layers; all seen tokens if it drops none."""
    from lrsa_lit.attention import LRSACache

    if not isinstance(cache, LRSACache):
        return int(cache.get_seq_length())
    stored = cache.stored_tokens()
    return round(sum(stored) / len(stored))
