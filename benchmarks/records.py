"""The record of a benchmark: who measured what with which versions, and the rows, so that a stopped run continues."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_FIXED = ("device", "commit", "torch", "triton")
"""What must not differ between the rows of a record."""


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
            if all(earlier.get(name) == about[name] for name in _FIXED) and about["commit"] is not None:
                self.rows = earlier["rows"]
                self.about = {**about, "command": earlier["command"]}
                if earlier["command"] != about["command"]:
                    self.about["command"] += f"; {about['command']}"

    def has(self, **key: Any) -> bool:
        """Whether a row with these entries has been measured, and not ``skipped``."""
        rows = (row for row in self.rows if "skipped" not in row)
        return any(all(row.get(name) == value for name, value in key.items()) for row in rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row; it replaces one with the same keys."""
        self.rows = [old for old in self.rows if any(old.get(name) != row.get(name) for name in self.keys)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")


def _commit() -> str | None:
    """The commit of this code, or the variable COMMIT where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=8"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
