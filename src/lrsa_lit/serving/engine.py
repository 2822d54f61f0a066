"""Continuous batching over compressed caches: jobs in, tokens out, independent of any server.

A step reads a piece of bounded length of one prompt and then decodes one token of each row, so a long prompt does not
block other answers. Every job gets the same answer as if it ran alone.
"""

from __future__ import annotations

import collections
import logging
import random
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrsa_lit.attention import LRSACache, LRSAConfig, base_of, enabled_config, prefill
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.serving.job import Event, Finish, Job
from lrsa_lit.serving.memory import PastBytes
from lrsa_lit.serving.rows import Rows
from lrsa_lit.serving.sampling import next_tokens
from lrsa_lit.serving.snapshots import Snapshots

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The limits of an engine.

    Args:
        rows: the most answers that are decoded together.
        memory: the most bytes of all caches together, without snapshots.
        snapshots: the most bytes of snapshots; 0 keeps none.
        tokens_per_step: the most tokens of a prompt that are read in one step.
    """

    rows: int = 32
    memory: int = 2 << 30
    snapshots: int = 1 << 30
    tokens_per_step: int = 512


class Held(NamedTuple):
    """The current load of an engine.

    Attributes:
        rows: answers being decoded.
        reading: jobs whose prompts are being read.
        waiting: jobs that are not admitted yet.
        reserved: the most bytes that the caches of admitted jobs may use.
        snapshots: bytes of snapshots.
    """

    rows: int
    reading: int
    waiting: int
    reserved: int
    snapshots: int


class _Row(NamedTuple):
    uid: str
    choice: int


@dataclass(eq=False)
class _Answer:
    """A choice that is being decoded."""

    job: Job
    draw: random.Random
    cached: int
    token: int = 0
    count: int = 0


@dataclass(eq=False)
class _Prompt:
    """A prompt that is being read."""

    job: Job
    cache: LRSACache
    cached: int
    planned: dict[int, bytes]
    done: int
    before: bytes | None


def check_served(config: LRSAConfig) -> None:
    """Raise a UserError unless the cache size of the rule is a closed form of the length."""
    if config.system is not None:
        reason = "is not served: its cache size is not known in advance; rules of partitions are served"
        raise UserError("system", type(config.system).__name__, reason=reason)
    if config.latents:
        raise UserError("latents", reason="are not served, only caches of keys and values")


class Engine:
    """Answers jobs with a model.

    Args:
        model: a causal language model with LRSA enabled, in evaluation mode.
        stops: tokens that end an answer.
        limits: the limits; by default those of :class:`Limits`.
        graphed: as in :class:`Rows`.

    Raises:
        UserError: LRSA is not enabled, the model has a system, or its caches hold latents.
    """

    def __init__(
        self, model: Any, stops: Container[int], limits: Limits | None = None, *, graphed: bool | None = None
    ) -> None:
        self.model, self._stops = base_of(model), stops
        self.limits = Limits() if limits is None else limits
        config = enabled_config(self.model)
        if config is None:
            raise UserError("model", reason="LRSA is not enabled on it; call lrsa_lit.attention.enable first")
        check_served(config)
        self.past_bytes = PastBytes(config, self.model.config, self.model.dtype.itemsize)
        self.snapshots = Snapshots(config.rule, self.limits.snapshots)
        self._rows: Rows[_Row] = Rows(self.model, graphed=graphed)
        self._waiting: collections.deque[Job] = collections.deque()
        self._prompts: collections.deque[_Prompt] = collections.deque()
        self._answers: dict[_Row, _Answer] = {}
        self._admitted: dict[str, Job] = {}
        self._live: dict[str, int] = {}

    @property
    def idle(self) -> bool:
        """Whether there are no jobs."""
        return not (self._waiting or self._prompts or self._answers)

    @property
    def has_room(self) -> bool:
        """Whether all submitted jobs are admitted."""
        return not self._waiting

    @property
    def held(self) -> Held:
        """The current load."""
        counts = len(self._answers), len(self._prompts), len(self._waiting)
        return Held(*counts, self._reserved(self._admitted.values()), self.snapshots.nbytes)

    def submit(self, job: Job) -> None:
        """Submit a job. It waits until there is room for it.

        Raises:
            UserError: the job exceeds the limits even if it runs alone.
        """
        if job.choices > self.limits.rows:
            raise UserError("n", job.choices, f"an integer from 1 to {self.limits.rows}, the rows of this server")
        if (needed := self._reserved([job])) > self.limits.memory:
            reason = f"would need {needed:,} bytes of cache, more than the {self.limits.memory:,} of this server"
            raise UserError("messages", reason=reason, hint="shorten the prompt, or lower max_tokens or n")
        self._waiting.append(job)

    def cancel(self, uid: str) -> None:
        """Remove a job in any state. Unknown jobs are ignored, because they may have been answered already."""
        self._waiting = collections.deque(job for job in self._waiting if job.uid != uid)
        self._prompts = collections.deque(prompt for prompt in self._prompts if prompt.job.uid != uid)
        for row in [row for row in self._answers if row.uid == uid]:
            self._leave(row)
        self._release(uid)

    def step(self) -> list[Event]:
        """Admit jobs, read a piece of a prompt, and decode a token of each row."""
        self._admit()
        events = list(self._read())
        if self._answers:
            events += self._decode()
        return events

    def _reserved(self, jobs: Iterable[Job]) -> int:
        """The most bytes that the caches of these jobs may use."""
        lengths = [job.tokens for job in jobs for _ in range(job.choices)]
        return self.past_bytes.together(lengths, self._rows.places(len(lengths)) if self._rows.graphed else None)

    def _admit(self) -> None:
        """Admit jobs in order. Small jobs do not overtake a large one, so it does not wait forever."""
        while self._waiting:
            jobs = [*self._admitted.values(), self._waiting[0]]
            if sum(job.choices for job in jobs) > self.limits.rows or self._reserved(jobs) > self.limits.memory:
                return
            job = self._waiting.popleft()
            self._admitted[job.uid], self._live[job.uid] = job, job.choices
            cache, plan = LRSACache.of(self.model), self.snapshots.plan(job.ids)
            if plan.key is not None:
                self.snapshots.restore(plan.key, cache)
            self._prompts.append(_Prompt(job, cache, plan.length, plan.wanted, plan.length, plan.key))

    def _read(self) -> Iterator[Event]:
        """Read a piece of the next prompt. Prompts take turns."""
        if not self._prompts:
            return
        prompt = self._prompts.popleft()
        job = prompt.job
        try:
            logits = self._read_piece(prompt)
        except Exception as error:
            _log.exception("Job %s failed while its prompt was read", job.uid)
            self._release(job.uid)
            for choice in range(job.choices):
                yield Event(job.uid, choice, None, "error", prompt.cached, message_of(error))
            return
        if prompt.done < len(job.ids):
            self._prompts.append(prompt)
            return
        draws, longest = job.draws(), job.tokens
        copies = [prompt.cache]
        for _ in draws[1:]:
            copies.append(LRSACache.of(self.model))
            copies[-1].restore(prompt.cache.pasts())
        for choice, (draw, cache) in enumerate(zip(draws, copies, strict=True)):
            row = _Row(job.uid, choice)
            self._answers[row] = _Answer(job, draw, prompt.cached)
            self._rows.join(row, cache, longest)
        rows = [_Row(job.uid, choice) for choice in range(job.choices)]
        yield from self._take(rows, logits.expand(len(rows), -1))

    def _read_piece(self, prompt: _Prompt) -> Tensor:
        """Read the next piece of a prompt; returns the logits (1, V) of its last token."""
        ids, start = prompt.job.ids, prompt.done
        stop = min(len(ids), start + self.limits.tokens_per_step)
        stop = min([end for end in prompt.planned if start < end <= stop], default=stop)
        piece = torch.tensor([ids[start:stop]], device=self.model.device)
        logits = prefill(self.model, piece, prompt.cache, tokens_per_call=len(ids))
        prompt.done = stop
        if (key := prompt.planned.get(stop)) is not None:
            self.snapshots.take(key, prompt.cache, prompt.before)
            prompt.before = key
        return logits[:, -1]

    def _decode(self) -> list[Event]:
        rows = self._rows.keys
        try:
            logits = self._rows.step({row: self._answers[row].token for row in rows})
        except Exception as error:
            # The layers may now hold different tokens, so no row can continue.
            _log.exception("A step of %d rows failed", len(rows))
            answers, self._answers = self._answers, {}
            self._rows.clear()
            for uid in {row.uid for row in rows}:
                self._release(uid)
            return [Event(row.uid, row.choice, None, "error", answers[row].cached, message_of(error)) for row in rows]
        return list(self._take(rows, logits))

    def _take(self, rows: list[_Row], logits: Tensor) -> Iterator[Event]:
        """Choose the next token of each row, and end the rows that are complete."""
        answers = [self._answers[row] for row in rows]
        jobs = [answer.job for answer in answers]
        uniform = [answer.draw.random() if answer.job.temperature > 0 else 0.0 for answer in answers]
        tokens = next_tokens(logits, [job.temperature for job in jobs], [job.top_p for job in jobs], uniform)
        for row, answer, token in zip(rows, answers, tokens, strict=True):
            answer.token, answer.count = token, answer.count + 1
            finish: Finish | None = None
            if token in self._stops:
                finish = "stop"
            elif answer.count == answer.job.max_new_tokens:
                finish = "length"
            if finish is not None:
                self._leave(row)
            yield Event(row.uid, row.choice, None if finish == "stop" else token, finish, answer.cached)

    def _leave(self, row: _Row) -> None:
        del self._answers[row]
        self._rows.leave(row)
        self._live[row.uid] -= 1
        if not self._live[row.uid]:
            self._release(row.uid)

    def _release(self, uid: str) -> None:
        self._admitted.pop(uid, None)
        self._live.pop(uid, None)
