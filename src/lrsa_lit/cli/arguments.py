"""What the light commands share: arguments whose mistakes are one line, and an end that leaves no process behind."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from lrsa_lit.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what the command line prints in one line."""
        raise UserError(message.removeprefix("argument "), reason=f"see {self.prog} --help")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """The option ``--plugins``, whose value is a list of modules' names."""
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module of yours, whose compressor the model was trained with; may be given several times",
    )


def add_on(parser: argparse.ArgumentParser) -> None:
    """The option ``--on``, of commands that run others."""
    parser.add_argument(
        "--on",
        metavar="RAY",
        help="run on a Ray cluster, whose machines share the folders: ray (of this machine) or ray://HOST:PORT; "
        "default: one after the other, here",
    )


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C within the block, so that child processes are stopped either way."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
