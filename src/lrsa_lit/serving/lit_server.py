"""A LitServer that answers chats: built of its parts, run until it is told to end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import litserve

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.serving.api_error import add_handlers
from lrsa_lit.serving.chat_spec import ChatSpec, Front
from lrsa_lit.serving.engine import Limits
from lrsa_lit.serving.engine_loop import Shared
from lrsa_lit.serving.serving_api import Load, ServingAPI

HOSTS = ("127.0.0.1", "0.0.0.0", "::")
"""Addresses that LitServe listens on."""
_MOST_BODY = 64 << 20


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how.

    Args:
        host: one of :data:`HOSTS`.
        port: from 1024.
        key: that requests must have; None: anybody may ask.
        drain: seconds that answers have to end once the server is told to.
        front_ends: processes that speak HTTP.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    drain: int = 30
    front_ends: int = 1


def check_free(host: str, port: int) -> None:
    """Raise a UserError unless the port can be listened on; a server takes long to load before it would say so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot be listened on at {host} ({error.strerror})"
            raise UserError("--port", port, reason=reason, hint="end what uses it, or choose another") from None


def serve(load: Load, front: Front, limits: Limits, address: Address, devices: list[str]) -> None:
    """Serve until SIGTERM or Ctrl-C; what is being answered then is answered first.

    Args:
        load: the model, in each worker.
        front: what is known of the model without its weights.
        limits: of each worker.
        address: where it listens.
        devices: of the workers, such as ``cpu`` or ``cuda:1``.
    """
    shared = Shared(len(devices))
    api = ServingAPI(load, limits, shared, address.key, ChatSpec(front, limits, shared))
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
    server.uvicorn_graceful_timeout = address.drain
    add_handlers(server.app)
    with _ended_by_sigterm():
        try:
            server.run(
                host=address.host,
                port=address.port,
                num_api_servers=address.front_ends,
                log_level="warning",
                generate_client_file=False,
            )
        except RuntimeError as error:
            # A worker's own error is in the log.
            raise UserError("MODEL", reason=f"cannot be served: {message_of(error)}") from error
        except (EOFError, ConnectionError):
            # LitServe has ended everything by then, its queues too.
            raise SystemExit("lrsa: a worker has died, and the server with it; the log above may say why") from None


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end LitServe as Ctrl-C does: front ends first, which wait for their answers, then workers.

    Some supervisors send it to all processes. What carries messages between them, a fork of this one, must not end
    before the others.
    """
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise KeyboardInterrupt
        if multiprocessing.current_process().name.startswith("LitServer"):
            # Uvicorn raises the signal again once it has ended.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
