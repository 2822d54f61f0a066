"""The device, commit and versions with which a result was made."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


@functools.cache
def describe() -> dict[str, str | None]:
    """The device, the commit, and the versions of the libraries that affect a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    commit = os.environ.get("LRSA_COMMIT") or git("rev-parse", "--short", "HEAD")
    return {"device": device, "commit": commit, **versions("torch", "triton", "transformers", "lightning")}


def versions(*packages: str) -> dict[str, str | None]:
    """The version of each package; None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git(*arguments: str) -> str | None:
    """The output of a git command in the folder of this code; None outside of this project's checkout."""

    def answer(*command: str) -> str:
        options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        return str(subprocess.run(["git", *command], **options).stdout).strip()  # type: ignore[call-overload]

    try:
        # A virtual environment inside somebody's checkout must not report that project's commit.
        answer("ls-files", "--error-unmatch", Path(__file__).name)
        return answer(*arguments)
    except (OSError, subprocess.CalledProcessError):
        return None
