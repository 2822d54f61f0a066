"""Refusal of new requests while a front end that was asked to stop finishes its answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lrsa_lit.serving import gauges
from lrsa_lit.serving.api_error import ApiError

_POLL = 0.1
"""Seconds between two looks at what is still being answered."""


class Draining:
    """ASGI middleware that answers 503 from SIGTERM or Ctrl-C on, and stops Uvicorn once nothing is answered any more.

    Uvicorn itself would stop accepting connections at once. They would then wait in the socket, which other processes
    of the server keep open, until the server has exited.

    Args:
        app: the app.
        busy: whether requests are still being answered.
        fail: ends them with an error.
        seconds: the most seconds to wait for them before that.
    """

    def __init__(self, app: ASGIApp, busy: Callable[[], bool], fail: Callable[[], None], seconds: float) -> None:
        self._app, self._busy, self._fail, self._seconds = app, busy, fail, seconds
        self._ending: asyncio.Task[None] | None = None
        self._interrupts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request while the server stops; otherwise pass it on."""
        if scope["type"] == "lifespan":
            # Uvicorn has installed its handler by now, one for both signals.
            loop, stop = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._signalled, number, stop)
        elif self._ending is not None and scope["type"] == "http":
            error = ApiError("the server is stopping; ask another one", status=503, code="server_stopping")
            gauges.REQUESTS.labels("503").inc()
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _signalled(self, number: signal.Signals, stop: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end(stop))
        elif self._interrupts > 1:
            # Uvicorn waits for answers after the first call, but not after a second one for Ctrl-C.
            stop(signal.SIGTERM, None)
            stop(signal.SIGINT, None)

    async def _end(self, stop: Any) -> None:
        asyncio.get_running_loop().call_later(self._seconds, self._fail)
        while self._busy():
            await asyncio.sleep(_POLL)
        stop(signal.SIGTERM, None)
