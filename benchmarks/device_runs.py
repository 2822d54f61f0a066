"""What benchmarks of several devices share: processes, records, batches, a clock, and a model drawn on its devices."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from records import Record, about
from torch.utils.data import DataLoader

from lrsa_lit.data.collate import collate
from lrsa_lit.strategies import FullySharded

ANSWER, GIB = 64, 2**30


def in_processes(script: str, flags: list[str], *, seconds: float) -> dict[str, Any]:
    """The row of a script that runs in processes of its own, all of which end with it, or after so many seconds.

    Raises:
        RuntimeError: it wrote no row; the message is the last line of its errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        command = [sys.executable, str(Path(script).resolve()), "--row", str(row), *flags]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
        try:
            _, said = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"did not end within {seconds:.0f} s") from None
        finally:
            # Lightning starts the processes of further devices; one that waits for another would wait for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        if run.returncode or not row.exists():
            raise RuntimeError((said.strip().splitlines() or ["no message"])[-1])
        found: dict[str, Any] = json.loads(row.read_text())
    return found


def record_of(path: Path, keys: tuple[str, ...], *, rule: Any, smoke: bool) -> Record:
    """The record of a benchmark under a rule, with the device and the versions that measure it."""
    facts = about("transformers", "lightning", device="cpu" if smoke else "cuda")
    return Record(path, {**facts, "dtype": "bfloat16", "rule": str(rule)}, keys)


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
