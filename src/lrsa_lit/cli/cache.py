"""``lrsa cache``: list and clear the project's cache.

This module must import quickly.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import time
from collections.abc import Sequence
from typing import Any

from lrsa_lit.cache_contents import KINDS, REMADE, Entry, entries, free_space, remove
from lrsa_lit.cli.arguments import Parser, checked
from lrsa_lit.errors import UserError
from lrsa_lit.paths import cache_dir
from lrsa_lit.terminal import PlainConsole

_DAY = 86400.0

EPILOG = f"""\
NAME is the name of an entry in the list, a pattern (data/HotpotQA-*), or a kind:
{chr(10).join(f"  {kind:<12}{about}" for kind, about in KINDS.items() if kind != "other")}

LRSA_CACHE_DIR sets the folder of the cache; the default is ~/.cache/lrsa_lit. Runs, checkpoints and the MLflow store
are not in it. A process that has opened files of an entry can still read them.

examples:
  lrsa cache
  lrsa cache clear data --older-than 30
  lrsa cache clear --all --dry-run
"""


def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake, or an entry that cannot be removed, is a UserError."""
    options = _parse(arguments)
    found = entries()
    if options.action == "list":
        _show(found, as_json=options.json)
        return
    chosen = _chosen(found, options)
    for entry in chosen:
        if not options.dry_run:
            try:
                remove(entry)
            except OSError as error:
                raise UserError("cache", entry.name, reason=f"cannot be removed ({error.strerror or error})") from error
        print(f"{'would remove' if options.dry_run else 'removed'} {entry.name} ({readable(entry.size)})", flush=True)
    total = readable(sum(entry.size for entry in chosen))
    print(f"{len(chosen)} of {len(found)} entries, {total}{' would be freed' if options.dry_run else ' freed'}")


def readable(size: float) -> str:
    """Format a number of bytes, such as ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("lrsa cache", description="List or clear the project's cache.", epilog=EPILOG)
    add = parser.add_argument
    add("action", nargs="?", choices=("list", "clear"), default="list", help="default: list")
    add("names", nargs="*", metavar="NAME", help="entries to clear")
    add("--all", action="store_true", help=f"clear every entry of these kinds: {', '.join(REMADE)}")
    add("--older-than", type=checked(_days, "a number of days >= 0"), metavar="DAYS", help="only older entries")
    add("--dry-run", action="store_true", help="print what would be removed, and remove nothing")
    add("--json", action="store_true", help="list as JSON")
    options = parser.parse_intermixed_args(arguments)
    clears = options.action == "clear"
    for given, flag in ((options.names, "NAME"), (options.all, "--all"), (options.dry_run, "--dry-run"),
                        (options.older_than is not None, "--older-than")):  # fmt: skip
        if given and not clears:
            raise UserError(flag, reason="works only with `lrsa cache clear`")
    if clears and options.json:
        raise UserError("--json", reason="works only with `lrsa cache list`")
    if clears and bool(options.names) == options.all:
        raise UserError("NAME", reason="give either names of entries or --all")
    return options


def _days(text: str) -> float:
    if not (days := float(text)) >= 0:
        raise ValueError(text)
    return days


def _chosen(found: Sequence[Entry], options: argparse.Namespace) -> list[Entry]:
    """The entries that the options choose; a UserError if a name matches none."""
    names = [*REMADE] if options.all else options.names
    for name in () if options.all else names:
        if name not in KINDS and not any(_is_named(entry, name) for entry in found):
            kinds = ", ".join(kind for kind in KINDS if kind != "other")
            raise UserError("NAME", name, f"an entry that `lrsa cache` lists, a pattern, or a kind: {kinds}")
    chosen = [entry for entry in found if any(_is_named(entry, name) for name in names)]
    if options.older_than is None:
        return chosen
    latest = time.time() - options.older_than * _DAY
    return [entry for entry in chosen if entry.made <= latest]


def _is_named(entry: Entry, name: str) -> bool:
    return name in (entry.kind, entry.name) or fnmatch.fnmatchcase(entry.name, name)


def _show(found: Sequence[Entry], *, as_json: bool) -> None:
    root, free = cache_dir(), free_space(cache_dir())
    if as_json:
        listed: list[dict[str, Any]] = [
            {**dataclasses.asdict(entry), "paths": [str(path) for path in entry.paths]} for entry in found
        ]
        print(json.dumps({"folder": str(root), "free": free, "entries": listed}, indent=2))
        return
    console = PlainConsole()
    for entry in found:
        made = time.strftime("%Y-%m-%d", time.localtime(entry.made))
        console.say(f"{entry.kind:<11} {readable(entry.size):>10}  {made}  {entry.name}")
    total = readable(sum(entry.size for entry in found))
    room = "" if free is None else f", {readable(free)} free"
    console.say(f"{len(found)} entries, {total} in {root}{room}")
