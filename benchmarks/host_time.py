"""Host time of one call of the operator: how long Python and the driver take to launch it, whatever the GPU does.

    python benchmarks/host_time.py [--tokens 2048 8192] [--head-size 128 64]

On a GPU, a call is timed without waiting for its kernels, against torch's own attention by cuDNN.
Without a GPU, kernels are compiled for a Hopper GPU and a stand-in for Triton's driver launches nothing: this
is the time of all Python code except the launcher's. Without replays, Python works out every launch, and Triton binds
its arguments.
Writes ``results/host_time.json``; a row that fails is written with the reason, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from records import RESULTS, Record, about
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lrsa_lit.ops.sparse_attention import Rule, sparse_attention
from lrsa_lit.ops.sparse_attention.gluon import hopper, pipeline
from lrsa_lit.ops.sparse_attention.triton import launch, replay

KEYS = "tokens", "head size", "launches", "call"
RULE = Rule(sink_size=16, lag_size=128, top_k=32)


@contextlib.contextmanager
def stand_in_driver() -> Iterator[list[str]]:
    """A driver for a Hopper GPU that is not there; the names of the launched kernels are appended to what it yields."""
    launched: list[str] = []

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *arguments: Any) -> None:
            launched.append(self.name)

    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    active = SimpleNamespace(
        utils=SimpleNamespace(
            load_binary=lambda *arguments: (1, 2, 0, 0, 1024), get_device_properties=lambda device: properties
        ),
        launcher_cls=Launcher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", active),
        mock.patch.object(launch, "unsupported", return_value=None),
        mock.patch.object(hopper, "_is_hopper", return_value=hopper.CHECKED),
        mock.patch.object(pipeline, "multiprocessors", return_value=132),
    ):
        yield launched


def microseconds(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The fastest and the median of several calls; before each, the device has finished the one before."""
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return {"fastest": round(min(found), 1), "median": round(statistics.median(found), 1)}


def calls(tokens: int, dim: int, attention: Callable[..., torch.Tensor], device: str) -> dict[str, Callable[[], Any]]:
    """The forward without gradients, with them, and forward and backward, of one row as a model passes it."""
    heads, groups = (32, 8) if dim == 128 else (9, 3)
    query, key, value = (
        torch.randn(1, tokens, count, dim, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    )
    grad = torch.randn_like(query)

    def both() -> None:
        attention(query, key, value).backward(grad)
        query.grad = key.grad = value.grad = None

    return {
        "forward, no gradient": torch.no_grad()(lambda: attention(query, key, value)),
        "forward": lambda: attention(query, key, value),
        "forward + backward": both,
    }


def lrsa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return sparse_attention(query, key, value, RULE, impl="triton")


def cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


LAUNCHES = {
    "passes replayed": (lrsa, True, True),
    "replayed": (lrsa, True, False),
    "ordinary": (lrsa, False, False),
    "SDPA, cuDNN": (cudnn, False, False),
}
"""By name: the attention, and whether its launches and whether its passes are replayed."""
CALLS = "forward, no gradient", "forward", "forward + backward"


def measured(
    tokens: int, dim: int, launches: str, call: str, options: argparse.Namespace, device: str
) -> dict[str, float]:
    """Microseconds of a call."""
    attention, is_replayed, of_passes = LAUNCHES[launches]
    with mock.patch.multiple(replay, ENABLED=is_replayed, OF_PASSES=of_passes):
        return microseconds(calls(tokens, dim, attention, device)[call], options.repeats)


def main(args: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--head-size", type=int, nargs="+", default=[128])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = about(device=device) | ({} if device == "cuda" else {"device": "none: stand-in driver"})
    record = Record(options.out / "host_time.json", facts, KEYS)
    forms = [name for name in LAUNCHES if device == "cuda" or LAUNCHES[name][0] is lrsa]
    wanted = [
        (dict(zip(KEYS, key, strict=True)), functools.partial(measured, *key, options, device))
        for key in itertools.product(options.tokens, options.head_size, forms, CALLS)
    ]
    with contextlib.nullcontext() if device == "cuda" else stand_in_driver():
        list(record.measure(wanted))
    table = Table(*KEYS, "fastest", "median")
    for row in record.rows:
        table.add_row(
            *(str(row[name]) for name in KEYS),
            *(str(row.get(name, row.get("skipped"))) for name in ("fastest", "median")),
        )
    Console().print(record.about, table)
    return int(any("skipped" in row for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
