"""A background thread that sends a run's records to its store, so that the training neither waits nor fails.

MLflow's own queue (``log_batch(synchronous=False)``) is not sufficient. It drops metrics that a server does not accept
while a request is retried, the wait for it cannot be limited, and a run's status and artifacts do not go through it.
``tests/tracking/test_mlflow_queue.py`` fails as soon as a version of MLflow can do this.
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
    """One item to send; it counts as undelivered until ``done`` removes it from the queue."""

    what: str
    send: Callable[[], object]
    done: Callable[[], object]


class Delivery:
    """Sends metrics and other records in the background; while the store does not answer, they are kept.

    Args:
        send_metrics: sends a batch of metrics.
        beat: sends a heartbeat; called at the start and then every ``every`` seconds, but not after :meth:`rest`.
        every: seconds between two heartbeats.
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
        """Queue any other call; ``what`` names it in messages if it cannot be delivered."""
        with self._changed:
            self._calls.append((what, send))
            self._changed.notify_all()

    def rest(self, resting: bool = True) -> None:
        """Stop the heartbeats, so that an ended run is not marked as running again; or restart them."""
        with self._changed:
            self._resting, self._next_beat = resting, 0.0
            self._changed.notify_all()

    def flush(self, patience: float) -> list[str]:
        """Wait until everything is sent, at most ``patience`` seconds.

        Returns:
            Names of undelivered items, such as ``["12 metric values", "predictions.json"]``.
        """
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._metrics and not self._calls, timeout=patience)
            self._flushing = False
            return [f"{len(self._metrics)} {METRICS}"] * bool(self._metrics) + [what for what, _ in self._calls]

    def undelivered(self) -> list[Any]:
        """Metrics that are still queued, in order."""
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
                # Pause before the next attempt: shorter during flush(), and interrupted when a flush starts.
                elif self._flushing:
                    self._changed.wait(timeout=min(1.0, self._retry))
                else:
                    self._changed.wait_for(lambda: self._flushing, timeout=self._retry)

    def _attempt(self, task: _Task) -> bool:
        """Send one item; return whether it is finished: accepted, or refused permanently."""
        try:
            task.send()
        except Exception as error:
            # No error may stop the training.
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
            _log.info("The run's store answers again; kept metrics are being sent")
        return True
