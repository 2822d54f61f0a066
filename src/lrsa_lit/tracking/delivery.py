"""What a run has to say, sent to its store by a thread: the training neither waits for it nor dies of it.

MLflow's own queue (``log_batch(synchronous=False)``) does not do: it drops what a server does not take while one
request is tried again, nobody can bound the wait for it, and a run's status and artifacts do not go through it.
``tests/tracking/test_mlflow_queue.py`` fails where a version of MLflow has learned that.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lrsa_lit.tracking.store import reason, refused

METRICS = "metric values"
_MOST_METRICS = 1000
"""MLflow's limit for one request."""

_log = logging.getLogger("lrsa_lit.tracking")


class _Task(NamedTuple):
    """One thing to send, which counts as undelivered until ``done`` takes it off the queue."""

    what: str
    send: Callable[[], object]
    done: Callable[[], object]


class Delivery:
    """Sends metrics and other records in the background, keeping what a store does not take until it answers again.

    Args:
        send_metrics: sends a batch.
        beat: says that the run lives; called at the start and then every ``every`` seconds, but not after :meth:`rest`.
        every: seconds between two beats.
        retry: seconds between two attempts while the store does not answer.
    """

    def __init__(
        self,
        send_metrics: Callable[[Sequence[Any]], object],
        beat: Callable[[], object],
        every: float,
        retry: float = 15.0,
    ) -> None:
        self._send_metrics, self._beat = send_metrics, beat
        self._every, self._retry = every, retry
        self._metrics: list[Any] = []
        self._calls: collections.deque[tuple[str, Callable[[], object]]] = collections.deque()
        self._changed = threading.Condition()
        self._flushing = self._resting = self._late = False
        self._next_beat = 0.0
        self._refused: set[str] = set()
        threading.Thread(target=self._work, name="lrsa-delivery", daemon=True).start()

    def metrics(self, values: Sequence[Any]) -> None:
        """Queue metrics."""
        with self._changed:
            self._metrics.extend(values)
            self._changed.notify_all()

    def call(self, what: str, send: Callable[[], object]) -> None:
        """Queue anything else; ``what`` names it if it cannot be delivered."""
        with self._changed:
            self._calls.append((what, send))
            self._changed.notify_all()

    def rest(self, resting: bool = True) -> None:
        """Stop or start the beats: an ended run must not come alive again."""
        with self._changed:
            self._resting, self._next_beat = resting, 0.0
            self._changed.notify_all()

    def flush(self, patience: float) -> list[str]:
        """Wait until all is sent, at most ``patience`` seconds.

        Returns:
            What is still undelivered, such as ``["12 metric values", "predictions.json"]``.
        """
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._metrics and not self._calls, timeout=patience)
            self._flushing = False
            return [f"{len(self._metrics)} {METRICS}"] * bool(self._metrics) + [what for what, _ in self._calls]

    def undelivered(self) -> list[Any]:
        """Metrics that are still queued, in their order."""
        with self._changed:
            return list(self._metrics)

    def _next(self) -> _Task | None:
        if not self._resting and time.monotonic() >= self._next_beat:
            return _Task("heartbeat", self._beat, self._plan_beat)
        if batch := self._metrics[:_MOST_METRICS]:
            take_off = functools.partial(self._metrics.__delitem__, slice(len(batch)))
            return _Task(METRICS, functools.partial(self._send_metrics, batch), take_off)
        return _Task(*self._calls[0], self._calls.popleft) if self._calls else None

    def _plan_beat(self) -> None:
        self._next_beat = time.monotonic() + self._every

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._next, timeout=self._every)
                task = self._next()
            if task is None:
                continue
            dealt_with = self._attempt(task)
            with self._changed:
                if dealt_with:
                    task.done()
                    self._changed.notify_all()
                # Give the store some time; less while somebody waits, and none when somebody begins to.
                elif self._flushing:
                    self._changed.wait(timeout=min(1.0, self._retry))
                else:
                    self._changed.wait_for(lambda: self._flushing, timeout=self._retry)

    def _attempt(self, task: _Task) -> bool:
        """Send one thing; true if it is dealt with: taken, or refused for good."""
        try:
            task.send()
        except Exception as error:
            # Whatever it was, the training goes on.
            if refused(error):
                if task.what not in self._refused:
                    self._refused.add(task.what)
                    _log.warning("The run's store refused %s: %s", task.what, reason(error))
                return True
            if not self._late:
                self._late = True
                _log.warning("The run's store does not answer (%s); metrics are kept and sent late", reason(error))
            return False
        if self._late:
            self._late = False
            _log.info("The run's store answers again; what was kept is being sent")
        return True
