"""Evaluate shards in this process or in several: a few questions at a time leave a GPU waiting for its process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from lrsa_lit.errors import UserError
from lrsa_lit.study.shards import Evaluator, Outcome, Shard, joined, release


class OutOfTimeError(Exception):
    """The minutes are over; what is done is on the disk."""


class _Submits(Protocol):
    def submit(self, function: Callable[[Shard], Outcome], shard: Shard, /) -> Future[Outcome]: ...


class Workers:
    """Evaluates shards, in worker processes or in this one. A context: its end ends the workers.

    Args:
        count: worker processes; 0 evaluates in this process.
        left: tells the seconds until nothing new may be begun.
    """

    def __init__(self, count: int, left: Callable[[], float]) -> None:
        self.count, self.left = count, left
        self._pool: ProcessPoolExecutor | None = None
        self._processes: set[multiprocessing.process.BaseProcess] = set()
        self._warm: list[Future[None]] = []
        # Seconds that the last shard of a kind took for each of its questions.
        self._took: dict[tuple[Path, str], float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing that they hold is of use any more, and a shard may take long.
        for process in self._processes:
            process.terminate()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._processes, self._warm = None, set(), []

    def start(self) -> None:
        """Start the workers, if there are to be any; they import and open the GPU while this process goes on."""
        if self._pool is not None or not self.count:
            return
        self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), initializer=_prepare)
        others = set(multiprocessing.active_children())
        # Ctrl-C reaches all processes of a terminal. This one ends the others, which inherit that it is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._warm = [self._pool.submit(_warm_up) for _ in range(self.count)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes = set(multiprocessing.active_children()) - others

    def settle(self) -> None:
        """Wait until the workers that were started are ready, and so idle."""
        concurrent.futures.wait(self._warm, timeout=max(0.0, self.left()))

    def run(self, evaluations: Sequence[Sequence[Shard]]) -> Iterator[tuple[int, Outcome]]:
        """Evaluate, and yield the number of each evaluation with its outcome as soon as all of its shards are done.

        No shard is begun where the rest of its evaluation took longer the last time than what is left.

        Raises:
            OutOfTimeError: there was no time for all of them; shards in worker processes are then left undone.
            UserError: a shard's, or a worker died.
        """
        self.start()
        executor: _Submits = _Here() if self._pool is None else self._pool
        evaluate = Evaluator() if self._pool is None else _evaluate
        waiting = deque((number, place) for number, shards in enumerate(evaluations) for place in range(len(shards)))
        running: dict[Future[Outcome], tuple[int, int]] = {}
        found: list[dict[int, Outcome]] = [{} for _ in evaluations]
        while waiting or running:
            while waiting and len(running) < max(self.count, 1):
                number, place = waiting[0]
                # In this process an evaluation that is begun is ended: nothing else could be done with the time.
                if (self.count or not place) and self.left() <= self._needed(evaluations[number][place:]):
                    break
                with _deaths_named():
                    running[executor.submit(evaluate, evaluations[number][place])] = waiting.popleft()
            done, _ = concurrent.futures.wait(running, max(0.0, self.left()), FIRST_COMPLETED) if running else ((), ())
            if not done:
                raise OutOfTimeError
            for future in done:
                number, place = running.pop(future)
                with _deaths_named():
                    outcome = future.result()
                shard = evaluations[number][place]
                self._took[shard.work] = outcome.seconds / shard.size
                found[number][place] = outcome
                if len(found[number]) == len(evaluations[number]):
                    yield number, joined([outcome for _, outcome in sorted(found[number].items())])

    def _needed(self, shards: Sequence[Shard]) -> float:
        """Seconds for the first of some shards, and for all of them, with some to spare; 0 where nothing is known."""
        seconds = [shard.size * self._took.get(shard.work, 0.0) for shard in shards]
        return 1.2 * max(seconds[0], sum(seconds) / max(self.count, 1))


class _Here:
    """An executor that is done when it is asked."""

    def submit(self, function: Callable[[Shard], Outcome], shard: Shard, /) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(function(shard))
        return future


@contextlib.contextmanager
def _deaths_named() -> Iterator[None]:
    """A pool that has lost a worker refuses new work as well."""
    try:
        yield
    except concurrent.futures.BrokenExecutor:
        raise UserError("--workers: a worker process died; memory may not be enough for as many") from None


_evaluator = functools.cache(Evaluator)
"""The one of this worker."""


def _evaluate(shard: Shard) -> Outcome:
    try:
        return _evaluator()(shard)
    finally:
        # The next training is measured with all the memory.
        release()


def _prepare() -> None:
    """Before a worker does anything: it is one thread among many processes, and leaves with its parent."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _warm_up() -> None:
    """Import what an evaluation needs, and open the GPU."""
    import torch._dynamo
    from transformers import AutoModelForCausalLM  # noqa: F401

    import lrsa_lit.analysis.capture  # noqa: F401

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
