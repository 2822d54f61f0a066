"""The estimate of a configured fit, as a table."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import lightning
import torch
from rich.table import Table

from lrsa_lit.cli.estimate.layers import Layers, cost_of
from lrsa_lit.cli.estimate.probe import Batches, Cost
from lrsa_lit.data import token_cache
from lrsa_lit.data.collate import collate
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError
from lrsa_lit.strategies import shards_weights
from lrsa_lit.tasks import LongContextQA

_GIB = 2**30

_BATCHES = 1000
"""Batches of the data that are looked at for their lengths."""

_ANSWER = 32
"""Answer tokens of a made-up batch."""

_TRAINER = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")
"""Settings of the trainer that decide what a step costs."""


class Estimate(NamedTuple):
    """What a fit will take.

    Attributes:
        cost: of the whole model, on one device.
        tokens: of an optimizer step on average, over all devices.
        seconds: of an optimizer step.
        hours: of all steps, validation and waiting for data excluded; None where trainer.max_steps does not bound them.
        free: bytes that the device has.
        device: its name.
        measured: the layers of the models that were run.
        lengths: where the lengths of the batches are from.
    """

    cost: Cost
    tokens: float
    seconds: float
    hours: float | None
    free: int
    device: str
    measured: list[Layers]
    lengths: str

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.cost.peak <= self.free


def estimate(task: LongContextQA, data: QADataModule, trainer: lightning.Trainer, settings: dict[str, Any]) -> Estimate:
    """Measure a few layers of a configured fit, and work out what all of them take.

    Args:
        task: configured, its model not loaded yet.
        data: configured; its own batches are taken if they were tokenised before, else some of ``max_tokens`` each.
        trainer: configured.
        settings: what the trainer was configured with.

    Raises:
        UserError: the fit is of a kind that few layers on one device say nothing about, or even they do not fit.
    """
    _check(task, trainer)
    batches, lengths = _batches(data)
    options = {name: settings[name] for name in _TRAINER if settings.get(name) is not None}
    cost, measured = cost_of(task, batches, options)
    passes = trainer.accumulate_grad_batches
    seconds = passes * cost.pass_seconds + cost.step_seconds
    device = trainer.strategy.root_device
    return Estimate(
        cost=cost,
        tokens=passes * trainer.world_size * sum(map(_tokens, batches.typical)) / len(batches.typical),
        seconds=seconds,
        hours=seconds * trainer.max_steps / 3600 if trainer.max_steps > 0 else None,
        free=_free(device),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        measured=measured,
        lengths=lengths,
    )


def table(found: Estimate) -> Table:
    """An estimate to be printed."""
    cost = found.cost
    shown = Table(title="Estimate for one device", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    rest = cost.peak - cost.weights - cost.gradients - cost.optimizer
    rows = {
        "parameters": f"{round(cost.parameters):,}",
        "of them trained": f"{round(cost.trained):,}",
        "weights": _size_text(cost.weights),
        "gradients": _size_text(cost.gradients),
        "optimizer": _size_text(cost.optimizer),
        "activations and all else": _size_text(max(rest, 0)),
        "peak": _size_text(cost.peak),
        f"free on {found.device}": f"{_size_text(found.free)}: {'fits' if found.fits else 'does NOT fit'}",
        "tokens a step": f"{round(found.tokens):,}",
        "seconds a step": f"{found.seconds:.3g}",
        "tokens a second": f"{found.tokens / found.seconds:,.0f}",
        "hours for all steps": "unknown" if found.hours is None else f"{found.hours:.2g}",
    }
    for name, value in rows.items():
        shown.add_row(name, value)
    layers = " and ".join(f"{dense + sparse}" for dense, sparse in found.measured)
    shown.caption = (
        f"Measured on models of {layers} layers with random weights; {found.lengths}. Memory is that of tensors. "
        "Validation, checkpoints, waiting for data and what devices send each other are not in it."
    )
    return shown


def _size_text(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"


def _check(task: LongContextQA, trainer: lightning.Trainer) -> None:
    if shards_weights(trainer.strategy):
        raise UserError(
            "--estimate", reason="a sharded model is not estimated; see what one device needs without fsdp.yaml"
        )
    if task.backbone.quantization is not None:
        raise UserError(
            "--estimate", reason="model.backbone.quantization is not estimated; it needs the weights themselves"
        )


def _batches(data: QADataModule) -> tuple[Batches, str]:
    """Batches as the fit will see them, and where they are from."""
    if not token_cache.is_built(data.folder("train")):
        tokens = min(_ANSWER, data.max_tokens - 1)
        example = {
            "id": "",
            "input_ids": [5] * data.max_tokens,
            "prompt_length": data.max_tokens - tokens,
            "gold_spans": [],
            "answer_spans": [],
            "answers": [""],
            "match": "any",
        }
        batch = collate([example] * data.batch_size, pad_token_id=0)  # type: ignore[list-item]
        return Batches(batch, [batch]), f"the data is not tokenised yet: {data.max_tokens:,} tokens for each example"
    data.setup("fit")
    found = sorted((batch for _, batch in zip(range(_BATCHES), data.train_dataloader(), strict=False)), key=_area)
    typical = [found[math.floor(len(found) * part)] for part in (1 / 6, 1 / 2, 5 / 6)]
    return Batches(found[-1], typical), f"lengths of {len(found):,} batches of the data"


def _area(batch: Any) -> int:
    return int(batch["input_ids"].numel())


def _tokens(batch: Any) -> int:
    """Tokens without padding."""
    mask = batch.get("attention_mask")
    return _area(batch) if mask is None else int(mask.sum())


def _free(device: torch.device) -> int:
    """Bytes that a fit could have now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
