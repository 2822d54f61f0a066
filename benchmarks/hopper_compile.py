"""Compile the kernels for Hopper GPUs with the installed Triton, on any machine: no GPU is needed, and none is used.

    python benchmarks/hopper_compile.py --json hopper-compile.json

Shown are, for each kernel and dtype, the registers of a thread, the bytes of its stack, which hold what is spilled, and
shared memory. A kernel that compiles may still compute wrong numbers: ``make test-gpu`` on a Hopper GPU decides that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lrsa_lit.ops.sparse_attention.gluon import (
    forward_pipeline,
    key_gradient_pipeline,
    pipeline,
    query_gradient_pipeline,
)
from lrsa_lit.ops.sparse_attention.triton.host_functions import Inputs, Saved
from lrsa_lit.ops.sparse_attention.triton.work_tables import Geometry, compact_rows, compact_tiles

HOPPER = GPUTarget("cuda", 90, 32)
SCALE = 0.1
_STAND_IN = SimpleNamespace(
    get_current_target=lambda: HOPPER, get_current_device=lambda: 0, get_current_stream=lambda device: 0
)


def launches(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The launch of each kernel, by name: a small packed batch of two sequences with four query heads over two."""
    geometry = Geometry(16, 128, 32, 128, (0, 700, 1700), 0)
    rows = sum(compact_rows(geometry))

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype)

    query, output, grad, query_grad = (made(4, 1700, 128) for _ in range(4))
    inputs = Inputs(query, *(made(2, count, 128) for count in (1700, 1700, rows, rows)))
    lse, delta = (made(4, 1700, dtype=torch.float32) for _ in range(2))
    saved = Saved(inputs, output, lse)
    table = compact_tiles(geometry, query.device, key_gradient_pipeline.TILE.rows)
    partial = made(1, 2, rows, 128, dtype=torch.float32), made(1, 2, rows, 128, dtype=torch.float32)
    return {
        "forward": lambda: forward_pipeline.launch(inputs, output, lse, geometry, SCALE),
        "dQ": lambda: query_gradient_pipeline.launch(saved, grad, delta, query_grad, geometry, SCALE),
        "dK, dV": lambda: key_gradient_pipeline.launch(saved, grad, delta, partial, table, geometry, SCALE),
    }


def compiled(launch: Callable[[], None]) -> Any:
    """The kernel that a launch would run."""
    run, made = JITFunction.run, []

    def only_compile(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(run(self, *arguments, **(options | {"warmup": True})))

    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(pipeline, "multiprocessors", return_value=132),
        mock.patch.object(driver, "_active", _STAND_IN),
    ):
        launch()
    (kernel,) = made
    return kernel


def resources(kernel: Any) -> dict[str, int]:
    """Registers and bytes of stack of a thread, and bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        shown = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "REG:" in line]
    found = dict(part.split(":")[:2] for part in line.split() if ":" in part)
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": int(kernel.metadata.shared)}


def measured() -> Iterator[dict[str, Any]]:
    """A row for each kernel and dtype, with the error in the place of numbers where it does not compile."""
    for dtype in (torch.bfloat16, torch.float16):
        for name, launch in launches(dtype).items():
            row = {"triton": triton.__version__, "kernel": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                yield row | resources(compiled(launch))
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Print a table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    columns = "kernel", "dtype", "registers", "stack", "shared", "error"
    rows, table = list(measured()), Table(*columns)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    Console().print(f"triton {triton.__version__}", table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
