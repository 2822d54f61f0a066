"""The LitServe API: loads the model in each worker and checks the API key."""

from __future__ import annotations

import hmac
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import litserve
from fastapi import Request

from lrsa_lit.serving.api_error import ApiError
from lrsa_lit.serving.engine import Engine, Held, Limits
from lrsa_lit.serving.engine_loop import EngineLoop, Shared

Load = Callable[[str], tuple[Any, frozenset[int]]]
"""Loads the model on a device with LRSA enabled, and the tokens that end an answer. It is pickled for the workers."""


class ServingAPI(litserve.LitAPI):  # type: ignore[misc]
    """Answers chats with the engine.

    Args:
        load: loads the model.
        limits: the limits of each worker's engine.
        shared: the state that all processes share.
        key: the API key that requests must have; None needs no key.
        spec: the HTTP interface.
    """

    def __init__(self, load: Load, limits: Limits, shared: Shared, key: str | None, spec: Any) -> None:
        super().__init__(spec=spec, loop=EngineLoop())
        # Set by SIGTERM: the worker finishes its answers and then exits.
        self.ending = False
        self._load, self._limits, self.shared, self._key = load, limits, shared, key

    def setup(self, device: str) -> None:
        """Load the model in a worker."""
        # Ctrl-C reaches all processes of a terminal. Workers ignore it, so that they can finish their answers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)
        model, stops = self._load(device)
        self.engine = Engine(model, stops, self._limits)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def note(self, held: Held) -> None:
        """Set the Prometheus gauges to the engine's load."""
        from lrsa_lit.serving import gauges

        gauges.ROWS.set(held.rows)
        gauges.READING.set(held.reading)
        gauges.RESERVED.set(held.reserved)
        gauges.SNAPSHOTS.set(held.snapshots)
        gauges.WAITING.set(self.shared.waiting.value)

    def authorize(self, request: Request) -> None:
        """Raise an ApiError unless the request has the API key; ``/health`` needs none."""
        if self._key is None or request.url.path == "/health":
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            message = "the API key is wrong or missing; send it as 'Authorization: Bearer KEY'"
            raise ApiError(message, status=401, code="invalid_api_key")
