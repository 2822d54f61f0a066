"""Build the LitServer that answers chats, and run it until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import FrameType

import litserve

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.serving.address import Address
from lrsa_lit.serving.api_error import add_handlers
from lrsa_lit.serving.chat_spec import ChatSpec, Front
from lrsa_lit.serving.draining import Draining
from lrsa_lit.serving.engine import Limits
from lrsa_lit.serving.engine_loop import Shared
from lrsa_lit.serving.serving_api import Load, ServingAPI

_log = logging.getLogger(__name__)
_FRONT_END = "LitServer"
"""How LitServe names the processes that speak HTTP."""
_MOST_BODY = 64 << 20
_TO_END = 10
"""Seconds for a front end to end after it has waited for its answers."""


def serve(load: Load, front: Front, limits: Limits, address: Address, devices: list[str]) -> None:
    """Serve until SIGTERM or Ctrl-C. Running answers are finished first.

    Args:
        load: loads the model in each worker.
        front: the facts about the model that need no weights.
        limits: the limits of each worker.
        address: the network settings.
        devices: the device of each worker, such as ``cpu`` or ``cuda:1``.
    """
    shared = Shared(len(devices))
    spec = ChatSpec(front, limits, shared)
    api = ServingAPI(load, limits, shared, address.key, spec)
    kind, _, _ = devices[0].partition(":")
    indices = [int(device.partition(":")[2] or 0) for device in devices]
    server = litserve.LitServer(
        api,
        accelerator="cpu" if kind == "cpu" else "cuda",
        devices=1 if kind == "cpu" else indices,
        timeout=False,
        max_payload_size=_MOST_BODY,
        disable_openapi_url=True,
    )
    # LitServe kills front ends that take longer.
    server.uvicorn_graceful_timeout = address.drain + _TO_END
    add_handlers(server.app)
    stopped = functools.partial(spec.fail, "the server has stopped")
    server.app.add_middleware(Draining, busy=lambda: spec.busy, fail=stopped, seconds=address.drain)
    with _ended_by_signals(shared, address.drain):
        try:
            server.run(
                host=address.host,
                port=address.port,
                num_api_servers=address.front_ends,
                log_level="warning",
                generate_client_file=False,
            )
        except RuntimeError as error:
            # The worker has logged its own error.
            raise UserError("MODEL", reason=f"cannot be served: {message_of(error)}") from error
        except (EOFError, ConnectionError):
            # LitServe has already stopped all processes and queues.
            raise SystemExit("lrsa: a worker has died, so the server has stopped; see the log above") from None


@contextlib.contextmanager
def _ended_by_signals(shared: Shared, drain: int) -> Iterator[None]:
    """Make SIGTERM end LitServe like Ctrl-C: first the front ends, which wait for their answers, then the workers.

    Either says how many requests are still answered, since this may take up to ``drain`` seconds.

    Some supervisors send SIGTERM to all processes. The process that carries messages between them, a fork of this one,
    ignores it, because it must not end before the others.
    """
    own, told = os.getpid(), False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if os.getpid() == own and not told:
            told = True
            # Without its lock, which the front ends may hold.
            count = shared.answering.get_obj().value
            noun = "request" if count == 1 else "requests"
            wait = f", for at most {drain} s" if count else ""
            _log.info("Stopping: %d %s still to be answered%s; no more are accepted", count, noun, wait)
            # LitServe's thread that watches the workers outlives the process that it asks.
            logging.getLogger("litserve.server").addFilter(
                lambda record: "Monitoring worker" not in record.getMessage()
            )
            # LitServe ends them one after another, and the later ones would accept requests meanwhile.
            for process in multiprocessing.active_children():
                if process.name.startswith(_FRONT_END):
                    process.terminate()
        raise KeyboardInterrupt

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            interrupt(number, frame)
        if multiprocessing.current_process().name.startswith(_FRONT_END):
            # Uvicorn raises the signal again after its shutdown.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    before = {which: signal.signal(which, act) for which, act in ((signal.SIGTERM, end), (signal.SIGINT, interrupt))}
    try:
        yield
    finally:
        for which, act in before.items():
            signal.signal(which, act)
