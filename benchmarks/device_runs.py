"""What benchmarks of several devices share: processes, records, batches, a clock, and a model drawn on its devices."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from records import about
from torch.utils.data import DataLoader

from lrsa_lit.data.collate import collate
from lrsa_lit.strategies import FullySharded

ANSWER, GIB = 64, 2**30


def in_processes(script: str, row: Path, flags: list[str], *, about: dict[str, Any]) -> dict[str, Any]:
    """Run a script in processes that end with it; the row that it writes, or ``about`` and what went wrong."""
    row.parent.mkdir(parents=True, exist_ok=True)
    row.unlink(missing_ok=True)
    command = [sys.executable, str(Path(script).resolve()), "--row", str(row), *flags]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode or not row.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**about, "error": last[:300]}
    found: dict[str, Any] = json.loads(row.read_text())
    row.unlink()
    return found


def write_record(path: Path, rows: list[dict[str, Any]], *, rule: Any, smoke: bool, **more: Any) -> None:
    """Write the rows of a benchmark with the device and the versions that made them."""
    device = "cpu" if smoke else "cuda"
    record = {
        **about("transformers", "lightning", device=device),
        "dtype": "bfloat16",
        "rule": str(rule),
        "rows": rows,
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def batches(tokens: int, steps: int, seed: int, *, smoke: bool) -> DataLoader[Any]:
    """A batch of one sequence for each step, with an answer of ``ANSWER`` tokens at its end."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = 259 if smoke else 128256
    examples = [
        {
            "id": str(step),
            "input_ids": torch.randint(3, vocabulary, (tokens,), generator=generator).tolist(),
            "prompt_length": tokens - ANSWER,
            "gold_spans": [],
            "answer_spans": [],
            "answers": [""],
            "match": "any",
        }
        for step in range(steps)
    ]
    return DataLoader(examples, collate_fn=functools.partial(collate, pad_token_id=2), pin_memory=not smoke)


class OnDevice(FullySharded):
    """Draws the random weights where they are sharded: a CPU would take minutes for them."""

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with self.root_device:
            yield


class Clock(Callback):
    """Seconds of each step, of all devices together, and the largest peak of memory since training started."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_gib = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        _wait(trainer)
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _wait(trainer)
        self.seconds.append(time.perf_counter() - self._since)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        self.peak_gib = float(trainer.strategy.reduce(torch.tensor(peak, device=pl_module.device), reduce_op="max"))


def _wait(trainer: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    trainer.strategy.barrier()
