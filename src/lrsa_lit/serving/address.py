"""Where a server listens, checked before anything heavy is imported."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from lrsa_lit.errors import UserError

HOSTS = ("127.0.0.1", "0.0.0.0", "::")
"""Addresses that LitServe listens on."""


@dataclass(frozen=True)
class Address:
    """The network settings of a server.

    Args:
        host: one of :data:`HOSTS`.
        port: 1024 or higher.
        key: the API key that requests must have; None needs no key.
        drain: seconds that running answers have to finish after SIGTERM or Ctrl-C.
        front_ends: number of HTTP processes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    drain: int = 30
    front_ends: int = 1


def check_free(host: str, port: int) -> None:
    """Raise a UserError unless the port is free. The server itself would find out only after loading the model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"is not available on {host} ({error.strerror})"
            raise UserError("--port", port, reason=reason, hint="choose another port") from None
