"""The base of commands that take the arguments of ``lrsa fit`` and do something else, on one device."""

from __future__ import annotations

import argparse
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rich.progress import track

from lrsa_lit.cli.lightning_cli import LRSACLI, run_with
from lrsa_lit.cli.main import prepared
from lrsa_lit.errors import UserError
from lrsa_lit.paths import check_writable, expanded
from lrsa_lit.terminal import PlainConsole

Item = TypeVar("Item")


class FitTool(LRSACLI):
    """Parses and checks arguments like a fit, and then does something else.

    Args:
        own: the command's own options.
        arguments: those of a fit.

    Attributes:
        command: its name.
        needed: its own options that are required, and what they are.
    """

    command: ClassVar[str]
    needed: ClassVar[dict[str, str]] = {}

    def __init__(self, own: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.own = own
        super().__init__(arguments)

    @abstractmethod
    def work(self) -> None:
        """Do the command's work, on the first process only; its parts are built by then."""

    def check(self) -> None:
        """Refuse settings that the command does not support; called before anything is built."""

    def instead(self) -> Callable[[], None] | None:
        """Return the command's work, which replaces the fit."""
        if self.asked("estimate"):
            raise UserError("--estimate", reason=f"it is not allowed for {self.command}; only a fit is estimated")
        for name, what in self.needed.items():
            if getattr(self.own, name) is None:
                raise UserError(f"--{name}", reason=f"is required: {what}")
        self.check()
        return self._work

    def _work(self) -> None:
        if self.trainer.is_global_zero:
            self.work()

    def file(self) -> Path:
        """The file of ``--to``; a UserError if it cannot be written."""
        path = expanded("--to", self.own.to)
        if path.is_dir():
            raise UserError("--to", path, "a file", reason="is a folder")
        check_writable("--to", path, path.absolute().parent)
        return path

    @staticmethod
    def shown(title: str) -> Callable[[Iterable[Item]], Iterable[Item]]:
        """A function that shows the progress of an iteration on a terminal."""
        console = PlainConsole(stderr=True)
        hidden = not console.is_terminal
        return functools.partial(track, description=title, console=console, transient=True, disable=hidden)


def run_tool(tool: type[FitTool], parser: Any, arguments: Sequence[str]) -> None:
    """Run a command: the parser takes the command's own options, and the remaining arguments are a fit's."""
    own, others = parser.parse_known_args(arguments)
    run_with(functools.partial(tool, own), prepared("fit", others))
