"""Completion in bash and zsh, by argcomplete: ``eval "$(register-python-argcomplete lrsa)"``.

The parser here has only names, read from the source text, because the LightningCLI's parser takes seconds to build.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import Any

from lrsa_lit.cli import catalogue

_FLAGS = ("help", "help-all", "estimate", "print_config")


def complete(runs: Iterable[str], tools: Iterable[str]) -> None:
    """If the shell asks for completions, print them and exit; otherwise do nothing.

    Args:
        runs: commands with the settings of a run.
        tools: commands with their own options; only the commands' names are completed.
    """
    if "_ARGCOMPLETE" in os.environ and importlib.util.find_spec("argcomplete") is not None:
        import argcomplete

        argcomplete.autocomplete(_parser(runs, tools))


def _parser(runs: Iterable[str], tools: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lrsa", allow_abbrev=False)
    commands = parser.add_subparsers()
    for tool in tools:
        commands.add_parser(tool)
    for run in runs:
        _add_settings(commands.add_parser(run, add_help=False, allow_abbrev=False), run)
    return parser


def _add_settings(parser: argparse.ArgumentParser, command: str) -> None:
    configs = [f"configs/{name}" for name in catalogue.configs()]
    groups = {*catalogue.parts(), "data"}
    for name in sorted(catalogue.top_level(command) - groups - {"c", "config", *_FLAGS}):
        parser.add_argument(f"--{name}")
    for name in _FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--config", "-c").completer = lambda prefix, **_: _files(configs, prefix)  # type: ignore[attr-defined]
    for slot, kind in catalogue.SLOTS.items():
        names = sorted({**catalogue.named(kind), **catalogue.added(kind)})
        parser.add_argument(f"--{slot}.help", choices=names)
        parser.add_argument(f"--{slot}{'+' if kind == 'callbacks' else ''}", choices=names)
    for part in catalogue.parts():
        for name in catalogue.keys(str(catalogue.part_of(part))):
            if (key := f"{part}.{name}") not in catalogue.SLOTS:
                parser.add_argument(f"--{key}")
    settings: Mapping[str, Any] = {}
    for path in catalogue.named("data").values():
        settings = {**settings, **catalogue.keys(path)}
    for name in settings:
        if (key := f"data.{name}") not in catalogue.SLOTS:
            parser.add_argument(f"--{key}")


def _files(shipped: Iterable[str], prefix: str) -> list[str]:
    """Shipped files and files on disk that start with a prefix."""
    from argcomplete.completers import FilesCompleter

    return [*(name for name in shipped if name.startswith(prefix)), *FilesCompleter()(prefix)]
