"""The fits that kill.py kills: tiny ones that record, batch by batch, all that must be the same in a resumed run."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from lrsa_lit.checkpoints import rng

EVENTS = "events.jsonl"
LAST = Path("runs/recorder/0/checkpoints/last.ckpt")


class Recorder(Logger):
    """Append what a run logs to a file that survives the run's death; speeds are not comparable and left out."""

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if not name.startswith("perf/"):
                record("metric", f"{name} at {step}", float(value).hex())

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Watch(Callback):
    """Record each batch: its sample ids and the random state before it, its loss and the weights after it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.key = f"epoch {trainer.current_epoch}, batch {batch_idx}"
        record("ids", self.key, batch["id"])
        record("random", self.key, digest(rng.capture(torch.device("cpu"))))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        record("loss", self.key, float(outputs["loss"]).hex())
        record("weights", f"{self.key}, step {trainer.global_step}", digest(dict(pl_module.named_parameters())))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        record("validation", f"step {trainer.global_step}, batch {batch_idx}", batch["id"])


class HiddenDropout(Callback):
    """Dropout behind each MLP: Llama has none of its own."""

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, module in pl_module.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(output, self.rate, module.training)


class Case(NamedTuple):
    """A kind of run: a name, and what its config says beside the common part."""

    name: str
    config: dict[str, Any]


def cases() -> list[Case]:
    """Full training, saved after validations, and LoRA, accumulating, saved by steps; both packed and with workers."""
    full = {
        "trainer": {
            "val_check_interval": 5,
            "callbacks": [*callbacks({"monitor": "val/loss"}), {"class_path": f"{__name__}.HiddenDropout"}],
        },
    }
    lora = {
        "trainer": {
            "val_check_interval": 7,
            "accumulate_grad_batches": 2,
            "callbacks": callbacks({"every_n_train_steps": 2}),
        },
        "model": {"backbone": {"lora": {"rank": 4, "dropout": 0.2}}},
    }
    made = {"data": {"init_args": {"packing": {"tokens": 512}, "num_workers": 2}}}
    return [Case("full", full | made), Case("LoRA, accumulating", lora | made)]


def callbacks(saving: dict[str, Any]) -> list[dict[str, Any]]:
    """What watches a run, and saves its checkpoints."""
    early = {"monitor": "val/loss", "patience": 100}
    return [
        {"class_path": "lrsa_lit.checkpoints.SafeModelCheckpoint", "init_args": {"save_last": True, **saving}},
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": early},
        {"class_path": f"{__name__}.Watch"},
    ]


def common(data: Path, steps: int) -> dict[str, Any]:
    """The config of all cases."""
    return {
        "seed_everything": 1,
        "validate_first": False,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "log_every_n_steps": 1,
            "logger": {"class_path": f"{__name__}.Recorder"},
        },
        "model": {
            "backbone": {"source": "tiny"},
            "lrsa": {"sink_size": 4, "lag_size": 32, "top_k": 8},
            "max_new_tokens": 2,
        },
        "data": {
            "class_path": "lrsa_lit.data.QAFiles",
            "init_args": {
                "max_tokens": 512,
                "train": str(data),
                "val": str(data),
                "limit": {"val": 4},
            },
        },
    }


def write_records(path: Path, count: int = 30) -> None:
    """Questions over contexts of different lengths."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = "".join(chance.choice("abcdefgh ") for _ in range(chance.randrange(40, 240)))
            passages = [{"title": f"T{number}", "text": text}]
            line = {"id": f"q{number}", "passages": passages, "question": "What?", "answers": [text[:5]]}
            file.write(json.dumps(line) + "\n")


def record(kind: str, key: str, value: Any) -> None:
    """Write one event, by the system at once: it must be there when the process is killed."""
    line = json.dumps({"kind": kind, "key": key, "value": value}) + "\n"
    descriptor = os.open(EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def events(folder: Path) -> list[dict[str, Any]]:
    """What was recorded in a folder so far; a line cut short by a kill is no event."""
    path = folder / EVENTS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def digest(value: Any) -> str:
    """A hash of every bit of nested tensors and values."""
    found = hashlib.sha256()
    for name, leaf in leaves("", value):
        found.update(name.encode())
        found.update(leaf.detach().numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return found.hexdigest()[:16]


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values within nested dicts and lists, by a dotted name."""
    parts = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    )
    if parts is None:
        yield name, value
    else:
        for key, part in parts:
            yield from leaves(f"{name}.{key}", part)
