"""The loop that LitServe runs in a worker: it moves jobs from the queue to the engine, and events back to clients."""

from __future__ import annotations

import collections
import multiprocessing
import os
import queue
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from litserve.loops.base import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from lrsa_lit.serving.job import Event, Job

EVENTS = "events"
"""Sent instead of a request's id: the message holds events of many requests, as one per token would be slower."""
_IDLE = 0.5
"""Seconds to wait for a job while the engine is idle."""
_MOST_CANCELLED = 10_000


@dataclass
class Shared:
    """State that the server's processes share, in addition to LitServe's queues.

    Args:
        workers: the number of workers.

    Attributes:
        waiting: the number of requests that no worker has taken yet.
        answering: the number of requests that have been accepted and are not answered yet, waiting ones included.
        cancelled: for each worker, the ids of jobs whose clients have left.
        pids: the process ids of the workers; 0 for a worker that is not ready.
    """

    workers: int
    waiting: Synchronized[int] = field(init=False)
    answering: Synchronized[int] = field(init=False)
    cancelled: list[Queue[str]] = field(init=False)
    pids: Any = field(init=False)

    def __post_init__(self) -> None:
        # LitServe starts its workers with "spawn".
        context = multiprocessing.get_context("spawn")
        self.waiting, self.answering = context.Value("i", 0), context.Value("i", 0)
        self.cancelled = [context.Queue() for _ in range(self.workers)]
        self.pids = context.Array("i", self.workers)

    def enter(self, most: int) -> bool:
        """Count one more waiting request; False if ``most`` are waiting already."""
        with self.waiting.get_lock():
            if self.waiting.value >= most:
                return False
            self.waiting.value += 1
            return True

    def taken(self) -> None:
        """Count one waiting request less, because a worker has taken it."""
        with self.waiting.get_lock():
            self.waiting.value -= 1

    def began(self) -> None:
        """Count one more request that is being answered."""
        with self.answering.get_lock():
            self.answering.value += 1

    def ended(self) -> None:
        """Count one request less that is being answered."""
        with self.answering.get_lock():
            self.answering.value -= 1

    @property
    def bereaved(self) -> bool:
        """Whether a worker has died."""
        for pid in self.pids:
            try:
                if pid:
                    os.kill(pid, 0)
            except ProcessLookupError:
                return True
        return False

    def cancel(self, uid: str) -> None:
        """Cancel a job in all workers, because any of them may have it or get it."""
        for names in self.cancelled:
            names.put(uid)


class EngineLoop(LitLoop):  # type: ignore[misc]
    """Each call of :meth:`run` takes jobs and runs one step of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self._began = False
        self._homes: dict[str, int] = {}
        self._live: dict[str, int] = {}
        self._cancelled: collections.OrderedDict[str, None] = collections.OrderedDict()

    def run(  # type: ignore[override]
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """See LitServe's ``LitLoop``, which calls this again and again."""
        engine = lit_api.engine
        if not self._began:
            self._began, lit_api.shared.pids[worker_id] = True, os.getpid()
        if lit_api.ending and engine.idle:
            raise SystemExit
        self._take_cancelled(lit_api, worker_id)
        events = self._take_jobs(lit_api, request_queue)
        events += engine.step()
        lit_api.note(engine.held)
        for_consumer: dict[int, list[Event]] = {}
        for event in events:
            for_consumer.setdefault(self._homes[event.uid], []).append(event)
            if event.finish is not None:
                self._live[event.uid] -= 1
                if not self._live[event.uid]:
                    self._forget(event.uid)
        for consumer, of_consumer in for_consumer.items():
            message = of_consumer, LitAPIStatus.OK, LoopResponseType.STREAMING, worker_id
            transport.send((EVENTS, message), consumer_id=consumer)

    def _take_cancelled(self, lit_api: Any, worker_id: int) -> None:
        while True:
            try:
                uid = lit_api.shared.cancelled[worker_id].get_nowait()
            except queue.Empty:
                return
            if uid in self._homes:
                lit_api.engine.cancel(uid)
                self._forget(uid)
                continue
            # The job may still be in the queue, or another worker may have it.
            self._cancelled[uid] = None
            if len(self._cancelled) > _MOST_CANCELLED:
                self._cancelled.popitem(last=False)

    def _take_jobs(self, lit_api: Any, request_queue: Any) -> list[Event]:
        """Take jobs while the engine has room; the others are left to other workers."""
        engine, refused = lit_api.engine, []
        while engine.has_room:
            given = self.get_request(request_queue, block=engine.idle, timeout=_IDLE)
            if given is None:
                break
            consumer, uid, _, job = given
            assert isinstance(job, Job)
            lit_api.shared.taken()
            if self._cancelled.pop(uid, uid) is None:
                continue
            self._homes[uid], self._live[uid] = consumer, job.choices
            try:
                engine.submit(job)
            except ValueError as error:
                refused += [Event(uid, choice, None, "refused", 0, str(error)) for choice in range(job.choices)]
        return refused

    def _forget(self, uid: str) -> None:
        del self._homes[uid], self._live[uid]
