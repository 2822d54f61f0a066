"""Shared parts of the light commands: one-line errors for arguments, and clean ends after Ctrl-C and SIGTERM."""

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
"""The largest allowed integer, above any number of tokens that fits into memory."""
Read = TypeVar("Read")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. Texts and paths must not be empty: ``Path("")`` is the current folder."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", None, _filled)
        self.register("type", Path, lambda text: Path(_filled(text)))

    def add_subparsers(self, **options: Any) -> Any:
        """Add actions; each checks its own arguments, which this parser would call by the name of the action."""
        actions = super().add_subparsers(**options)
        actions.type = str
        return actions

    def error(self, message: str) -> NoReturn:
        """Raise the error as a UserError, which the command line prints in one line."""
        raise UserError(message.removeprefix("argument "), reason=f"see {self.prog} --help")


def _filled(text: str) -> str:
    """The text of an argument; an error if it is empty or blank, as after a variable of the shell that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def checked(read: Callable[[str], Read], allowed: str) -> Callable[[str], Read]:
    """Make a type for argparse from ``read``, which raises a ValueError for a text that is not allowed."""

    def parse(text: str) -> Read:
        try:
            return read(text)
        except (ValueError, RecursionError):
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not allowed; it must be {allowed}") from None

    return parse


def integer(least: int = -LARGEST, most: int = LARGEST) -> Callable[[str], int]:
    """Make a type for argparse: an integer within bounds."""

    def read(text: str) -> int:
        if not least <= (value := int(text)) <= most:
            raise ValueError(text)
        return value

    return checked(read, f"an integer from {least} to {most}")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--plugins``, which makes a list of names of modules."""
    about = "import one of your modules, such as one with the model's compressor; may be repeated"
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help=about)


def add_length(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--max-new-tokens`` of commands that write summaries."""
    parser.add_argument("--max-new-tokens", metavar="N", type=integer(1), default=256)


def without_data(arguments: Sequence[str]) -> list[str]:
    """Remove ``--data`` flags from a run's arguments, for a command with other data; config files are kept."""
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


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that run other commands: where they run, and how many at the same time."""
    # A cluster runs as many as it has room for.
    places = parser.add_mutually_exclusive_group()
    at_once = "commands that run at the same time on this machine"
    places.add_argument("--jobs", type=integer(1, LARGEST), default=1, help=at_once)
    where = "run on a Ray cluster whose machines share the folders: ray (on this machine) or ray://HOST:PORT"
    places.add_argument("--on", metavar="RAY", help=f"{where}; default: on this machine")


@contextlib.contextmanager
def called(flags: Mapping[str, str]) -> Iterator[None]:
    """In a with block, rename fields of UserErrors to a command's options: ``flags`` maps arguments to options."""
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
    """If Ctrl-C or SIGTERM ends the with block, print where the finished work is kept and how to continue."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"\nlrsa: {printable(str(path))} keeps finished work; run the same command to continue", file=sys.stderr)
        raise


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Like :func:`terminable`, for a command that continues when it is run again.

    Raises:
        SystemExit: code 130 after Ctrl-C or SIGTERM; a line says how to continue.
    """
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        print("\nlrsa: interrupted; run the same command to continue", file=sys.stderr)
        raise SystemExit(130) from None
