"""The record of a benchmark: who measured what with which versions, and the rows, so that a stopped run continues."""

from __future__ import annotations

import datetime
import gc
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_FIXED = ("device", "commit", "torch", "triton")
"""What must not differ between the rows of a record."""


class MissingError(Exception):
    """Something that cannot be measured here, and why."""


def tried(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement returns, or ``skipped`` with the reason: one that fails must not end the others."""
    try:
        return measure()
    except MissingError as reason:
        return {"skipped": str(reason)}
    except Exception as failure:
        first = str(failure).strip().splitlines() or [""]
        return {"skipped": f"{type(failure).__name__}: {first[0][:200]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def about(*packages: str, device: str = "cuda") -> dict[str, Any]:
    """Date, device, commit, command, and the versions of torch, triton and further packages (None: not installed)."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "commit": _commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        **{name: _version(name) for name in ("torch", "triton", *packages)},
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
    }


class Record:
    """Rows in a JSON file, each written as soon as it is measured.

    Rows of an earlier run stay, and are not measured again, if device, commit and versions are the same; another run's
    file is replaced.

    Args:
        path: the file; its folder is made.
        about: what :func:`about` returns, and more that holds for all rows.
        keys: the entries that tell rows apart.
    """

    def __init__(self, path: Path, about: dict[str, Any], keys: tuple[str, ...]) -> None:
        self.path, self.about, self.keys = path, about, keys
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            earlier = json.loads(path.read_text())
            if all(earlier.get(name) == about[name] for name in _FIXED):
                self.rows = earlier["rows"]
                self.about = {**about, "command": earlier["command"]}
                if earlier["command"] != about["command"]:
                    self.about["command"] += f"; {about['command']}"

    def has(self, **key: Any) -> bool:
        """Whether a row with these entries has been measured, and not ``skipped``."""
        rows = (row for row in self.rows if "skipped" not in row)
        return any(all(row.get(name) == value for name, value in key.items()) for row in rows)

    def measure(
        self, wanted: Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]], until: float = float("inf")
    ) -> Iterator[dict[str, Any]]:
        """Measure and write what is lacking, and yield its rows; a row that fails is written with the reason.

        Args:
            wanted: the keys of each row, and what measures the others of its entries.
            until: begin no row after this value of ``time.perf_counter``.
        """
        lacking = [(key, run) for key, run in wanted if not self.has(**key)]
        for index, (key, run) in enumerate(lacking):
            if time.perf_counter() > until:
                print(f"{len(lacking) - index} rows left for another run, from {key} on", flush=True)
                return
            self.add({**key, **tried(run)})
            yield self.rows[-1]

    def add(self, row: dict[str, Any]) -> None:
        """Write a row; it replaces one with the same keys."""
        self.rows = [old for old in self.rows if any(old.get(name) != row.get(name) for name in self.keys)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")


def _commit() -> str:
    """The commit of this code; where there is no git, the variable COMMIT, or else a digest of the code."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=8"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or _digest()


def _digest() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*root.glob("src/**/*.py"), *root.glob("benchmarks/*.py")]):
        digest.update(path.read_bytes())
    return f"sha256 {digest.hexdigest()[:8]}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
