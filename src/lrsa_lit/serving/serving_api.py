"""LitServe's API of a model: what a worker loads, and who may ask."""

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
"""The model on a device, LRSA enabled, and the tokens that end an answer. It goes to other processes."""


class ServingAPI(litserve.LitAPI):  # type: ignore[misc]
    """Answers chats with the engine.

    Args:
        load: the model.
        limits: of each worker's engine.
        shared: what processes tell each other.
        key: that requests must have; None: anybody may ask.
        spec: of the interface.
    """

    def __init__(self, load: Load, limits: Limits, shared: Shared, key: str | None, spec: Any) -> None:
        super().__init__(spec=spec, loop=EngineLoop())
        # Told to end, a worker ends its answers first.
        self.ending = False
        self._load, self._limits, self.shared, self._key = load, limits, shared, key

    def setup(self, device: str) -> None:
        """Load the model in a worker."""
        # Ctrl-C goes to all processes of a terminal; those who wait for answers are to get them first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)
        model, stops = self._load(device)
        self.engine = Engine(model, stops, self._limits)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ending = True

    def note(self, held: Held) -> None:
        """Tell Prometheus what the engine holds."""
        from lrsa_lit.serving import gauges

        gauges.ROWS.set(held.rows)
        gauges.READING.set(held.reading)
        gauges.RESERVED.set(held.reserved)
        gauges.SNAPSHOTS.set(held.snapshots)
        gauges.WAITING.set(self.shared.waiting.value)

    def authorize(self, request: Request) -> None:
        """Raise an ApiError unless the request has the key. Whether the server lives, anybody may ask."""
        if self._key is None or request.url.path == "/health":
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            message = "the API key is wrong or missing; send it as 'Authorization: Bearer KEY'"
            raise ApiError(message, status=401, code="invalid_api_key")
