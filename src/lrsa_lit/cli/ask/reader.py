"""A model that reads a text into a cache, call by call, and answers from what the cache kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.models.generation import GREEDY, stop_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

_TOKENS_PER_CALL = {"cpu": 1024, "accelerator": 8192}
"""So that the progress bar moves every second or so."""
_ROOM = 1024
"""Most new tokens that a CUDA graph allocates memory for at a time."""


@dataclass(frozen=True)
class Answer:
    """An answer and what it took: one line of ``--json``.

    Attributes:
        question: as asked.
        answer: without white space around it.
        tokens_seen: tokens fed so far: the text, all questions and all answers, but for the last token generated.
        tokens_kept: of them stored per head, averaged over the layers.
        seconds_to_first_token: since the question was put; the first question's includes reading the text.
        seconds: the same up to the last token.
    """

    question: str
    answer: str
    tokens_seen: int
    tokens_kept: int
    seconds_to_first_token: float
    seconds: float

    def summary(self) -> str:
        """Tokens read and kept, in one line."""
        share = 100 * self.tokens_kept / self.tokens_seen
        return f"{self.tokens_seen:,} tokens read, {self.tokens_kept:,} kept per head ({share:.0f} %)"


class Reader:
    """A model that reads a dialogue's text into a cache and answers from what that kept.

    Args:
        model: in evaluation mode, with LRSA enabled if the cache is a compressed one.
        cache: an empty cache.
        tokenizer: the model's.
        dialogue: the text.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        tokenizer: PreTrainedTokenizerBase,
        dialogue: Dialogue,
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.cache = cache
        self.tokenizer = tokenizer
        self.dialogue = dialogue
        self.max_new_tokens = max_new_tokens
        self._reading = 0.0

    def read(self, console: Console) -> None:
        """Take in the text, with a progress bar."""
        started = time.perf_counter()
        columns = (
            TextColumn("reading"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(self.dialogue.ids), rate="")

            def show(count: int) -> None:
                rate = count / (time.perf_counter() - started)
                progress.update(task, completed=count, rate=f"{rate:,.0f} tokens/s")

            self._feed(self.dialogue.ids, show)
        self._reading = time.perf_counter() - started

    def answer(self, question: str, *, show: bool) -> Answer:
        """Answer a question greedily, up to the first special token.

        Args:
            question: a further turn of the dialogue.
            show: print the answer to stdout while it is generated.
        """
        from transformers import TextStreamer

        from lrsa_lit.attention import cache_argument

        started, self._reading = time.perf_counter() - self._reading, 0.0
        self.dialogue.ask(question)
        # All but the last token, in calls of bounded length: a question may be long, too.
        self._feed(self.dialogue.ids[self.cache.get_seq_length() : -1])
        ids = self._tensor(self.dialogue.ids)
        clock = _Clock(TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None)
        with self._fast():
            output: Any = self.model.generate(
                input_ids=ids,
                attention_mask=ids.new_ones(ids.shape),
                streamer=clock,
                max_new_tokens=self.max_new_tokens,
                use_cache=True,
                eos_token_id=stop_tokens(self.tokenizer),
                pad_token_id=self.tokenizer.pad_token_id,
                **cache_argument(self.model, self.cache),
                **GREEDY,
            )
        ended = time.perf_counter()
        new = output[0, ids.shape[1] :].tolist()
        self.dialogue.take(new)
        return Answer(
            question=question,
            answer=str(self.tokenizer.decode(new, skip_special_tokens=True)).strip(),
            tokens_seen=self.cache.get_seq_length(),
            tokens_kept=kept_tokens(self.cache),
            seconds_to_first_token=round(clock.first - started, 3),
            seconds=round(ended - started, 3),
        )

    def _fast(self) -> contextlib.AbstractContextManager[None]:
        """Single tokens by a CUDA graph, where there is a compressed cache on such a device."""
        from lrsa_lit.attention import LRSACache, graphed_decoding

        if not isinstance(self.cache, LRSACache):
            return contextlib.nullcontext()
        return graphed_decoding(self.model, self.cache, room=min(self.max_new_tokens, _ROOM))

    def _feed(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> None:
        from lrsa_lit.attention import prefill

        if ids:
            step = _TOKENS_PER_CALL["cpu" if self.model.device.type == "cpu" else "accelerator"]
            prefill(self.model, self._tensor(ids), self.cache, tokens_per_call=step, progress=progress)

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        import torch

        return torch.tensor([ids], device=self.model.device)


class _Clock:
    """A streamer of ``generate`` that notes when the first token came, and hands all on to another streamer."""

    def __init__(self, inner: Any) -> None:
        self.first = 0.0
        self._inner = inner
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        # The first call hands over the prompt.
        if self._calls == 2:
            self.first = time.perf_counter()
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


def kept_tokens(cache: Cache) -> int:
    """Tokens that a cache of one row stores per head, averaged over the layers; all it has seen if it drops none."""
    from lrsa_lit.attention import LRSACache

    if not isinstance(cache, LRSACache):
        return int(cache.get_seq_length())
    stored = cache.stored_tokens()
    return round(sum(stored) / len(stored))
