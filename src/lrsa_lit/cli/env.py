"""``lrsa env``: print versions, devices, kernels, caches and extras, for a bug report.

It also works if an import fails, and prints the error. Home folders, user names and passwords are left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import lrsa_lit
from lrsa_lit.cache_contents import entries, size_of
from lrsa_lit.cli.arguments import Parser
from lrsa_lit.cli.cache import readable
from lrsa_lit.errors import message_of, redacted
from lrsa_lit.paths import cache_dir
from lrsa_lit.terminal import PlainConsole

DISTRIBUTION = "lrsa-lit"
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "LRSA_CACHE_DIR", "LRSA_REPLAY_LAUNCHES",
    "MLFLOW_TRACKING_URI", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHDYNAMO_DISABLE",
    "TRITON_CACHE_DIR", "TRITON_INTERPRET",
)  # fmt: skip
"""Environment variables that affect runs."""
_FOR_DEVELOPERS = {"dev", "docs", "test"}
"""Extras that only developers need."""
_DTYPES = ("bfloat16", "float16", "float32")
_DIMS = (64, 128)
"""The usual head sizes."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = Parser("lrsa env", description=__doc__.partition(": ")[2].partition("\n")[0].capitalize())
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(arguments)
    found = facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    console = PlainConsole()
    for title, values in found.items():
        console.say(title)
        for name, value in values.items():
            console.say(f"  {name:<24} {value}")


def facts() -> dict[str, dict[str, str]]:
    """What the command prints: sections of names and values."""
    return {
        "system": dict(_system()),
        "packages": {name: version for name, (version, _) in _requirements().items()},
        "devices": dict(_devices()),
        "kernels (impl=auto)": dict(_kernels()),
        "folders": dict(_folders()),
        "extras": dict(_extras()),
        "environment": {name: _short(value) for name in _VARIABLES if (value := os.environ.get(name))},
    }


def _system() -> Iterator[tuple[str, str]]:
    yield DISTRIBUTION, f"{lrsa_lit.__version__} in {_short(Path(lrsa_lit.__file__).parent)}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) in {_short(sys.prefix)}"
    yield "platform", platform.platform()


def _requirements(extra: str = "") -> dict[str, tuple[str, bool]]:
    """The packages that the project or an extra requires: the installed version of each, and whether it is suitable."""
    from packaging.requirements import Requirement

    found: dict[str, tuple[str, bool]] = {}
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {DISTRIBUTION: ("is not installed as a package, so its requirements are unknown", False)}
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        applies = marker is None or marker.evaluate({"extra": extra})
        if not applies or (extra and (marker is None or marker.evaluate({"extra": ""}))):
            continue
        if requirement.name == DISTRIBUTION:
            for other in sorted(requirement.extras):
                found |= _requirements(other)
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found[requirement.name] = f"missing, needs {requirement.specifier}", False
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        found[requirement.name] = version if fits else f"{version}, needs {requirement.specifier}", fits
    return found


def _extras() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        for extra in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
            if extra in _FOR_DEVELOPERS:
                continue
            lacking = [f"{name} ({version})" for name, (version, fits) in _requirements(extra).items() if not fits]
            mend = f"; pip install '{DISTRIBUTION}[{extra}]'"
            yield extra, f"lacks {', '.join(lacking)}{mend}" if lacking else "installed"


def _devices() -> Iterator[tuple[str, str]]:
    memory = "" if (total := _memory()) is None else f", {readable(total)} of memory"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cpu", f"{usable} of {os.cpu_count()} cores{memory}"
    try:
        import torch

        yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"
        if not torch.cuda.is_available():
            yield "cuda", "no device that this torch can use"
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            capability = f"compute capability {about.major}.{about.minor}"
            yield f"cuda:{index}", f"{about.name}, {readable(about.total_memory)}, {capability}"
    # The command must also work on a broken installation.
    except Exception as error:
        yield "torch", f"cannot be used: {_failure(error)}"


def _memory() -> int | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _kernels() -> Iterator[tuple[str, str]]:
    """The kernels that the operator chooses for common dtypes and head sizes on each device."""
    try:
        import torch

        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        for device in devices or [torch.device("cpu")]:
            decided = {
                f"{dtype}, {dim} channels": _decided(device, getattr(torch, dtype), dim)
                for dtype in _DTYPES
                for dim in _DIMS
            }
            if len(kinds := set(decided.values())) == 1:
                yield str(device), kinds.pop()
                continue
            yield from ((f"{device} {kind}", what) for kind, what in decided.items())
    except Exception as error:
        yield "none", f"cannot be chosen: {_failure(error)}"


def _decided(device: Any, dtype: Any, dim: int) -> str:
    from lrsa_lit.ops.sparse_attention import choice

    name, refusal = choice("auto", device.type, dtype, dim)
    if name != "triton":
        return f"eager PyTorch; {refusal}"
    from lrsa_lit.ops.sparse_attention.gluon import hopper

    reason = hopper.refusal(device, dtype, dim)
    return "Triton, and Gluon for Hopper GPUs where calls are large" if reason is None else f"Triton; {reason}"


def _folders() -> Iterator[tuple[str, str]]:
    held: dict[str, int] = {}
    for entry in entries():
        held[entry.kind] = held.get(entry.kind, 0) + entry.size
    each = ", ".join(f"{kind} {readable(size)}" for kind, size in held.items())
    yield "cache of lrsa", f"{_short(cache_dir())}: {each or 'empty'}"
    for name, path in _others(os.environ).items():
        yield name, f"{_short(path)}: {readable(size_of(path)) if path.is_dir() else 'empty'}"


def _others(variables: Mapping[str, str]) -> dict[str, Path]:
    """Cache folders of libraries: their defaults, unless environment variables set them."""
    home, of_user = Path.home(), Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(variables.get("HF_HOME") or of_user / "huggingface")
    return {
        "cache of the hub": Path(variables.get("HF_HUB_CACHE") or hub / "hub"),
        "cache of triton": Path(variables.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
    }


def _failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {_short(message_of(error))[:300]}"


def _short(value: object) -> str:
    """Replace the home folder in a text by ~, and remove user names and passwords from addresses."""
    text, home = redacted(str(value)), str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
