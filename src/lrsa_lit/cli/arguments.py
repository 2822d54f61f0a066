"""What the light commands share: arguments whose mistakes are one line, and an end that leaves no process behind."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from lrsa_lit.errors import UserError, printable

LARGEST = 2**31 - 1
"""Bound of integers: more than any number of tokens that fits into memory."""
Read = TypeVar("Read")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what the command line prints in one line."""
        raise UserError(message.removeprefix("argument "), reason=f"see {self.prog} --help")


def checked(read: Callable[[str], Read], allowed: str) -> Callable[[str], Read]:
    """A type of argparse: what ``read`` makes of a text; where it raises a ValueError, the text is not allowed."""

    def parse(text: str) -> Read:
        try:
            return read(text)
        except (ValueError, RecursionError):
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not allowed; it must be {allowed}") from None

    return parse


def integer(least: int = -LARGEST, most: int = LARGEST) -> Callable[[str], int]:
    """A type of argparse: an integer within bounds."""

    def read(text: str) -> int:
        if not least <= (value := int(text)) <= most:
            raise ValueError(text)
        return value

    return checked(read, f"an integer from {least} to {most}")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """The option ``--plugins``, whose value is a list of modules' names."""
    about = "import a module of yours, whose compressor the model was trained with; may be given several times"
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help=about)


def add_length(parser: argparse.ArgumentParser) -> None:
    """The option ``--max-new-tokens`` of commands that write summaries."""
    parser.add_argument("--max-new-tokens", metavar="N", type=integer(1), default=256)


def without_data(arguments: Sequence[str]) -> list[str]:
    """The arguments of a run without flags of the data, for a command with other data; files of settings stay."""
    kept, skipped = [], False
    for argument in arguments:
        flag, assigned, _ = argument.partition("=")
        if flag == "--data" or flag.startswith("--data."):
            skipped = not assigned
        elif skipped:
            skipped = False
        else:
            kept.append(argument)
    return kept


def add_on(parser: argparse.ArgumentParser) -> None:
    """The option ``--on``, of commands that run others."""
    where = "run on a Ray cluster, whose machines share the folders: ray (of this machine) or ray://HOST:PORT"
    parser.add_argument("--on", metavar="RAY", help=f"{where}; default: one after the other, here")


@contextlib.contextmanager
def called(flags: Mapping[str, str]) -> Iterator[None]:
    """Name what a command's parts complain about as the command does: ``flags`` has its names of their arguments."""
    try:
        yield
    except UserError as error:
        name, dot, rest = error.field.partition(".")
        error.field = flags.get(name, name) + dot + rest
        raise


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


@contextlib.contextmanager
def kept_if_stopped(path: Path) -> Iterator[None]:
    """Say where a block that Ctrl-C or SIGTERM ends has left what it did, from which the same command goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"\nlrsa: what is done is kept in {printable(str(path))}; the same command goes on", file=sys.stderr)
        raise


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """As :func:`terminable`, for a command that goes on when it is given again.

    Raises:
        SystemExit: code 130, behind a line that says so, after Ctrl-C or SIGTERM.
    """
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        print("\nlrsa: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
