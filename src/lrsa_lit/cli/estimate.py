"""``lrsa fit … --estimate``: estimate a fit's memory and time from a few layers of its model.

All layers of one kind cost the same. So the configured training runs for some steps on models of the configured width
with two and four layers and random weights. The seconds and the memory peaks, of the passes and of the optimizer's
step, are extrapolated linearly to all layers. Only the model's config and tokenizer are loaded, and nothing is recorded
or written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning
import torch
from rich.table import Table

from lrsa_lit.attention import mean_top_k
from lrsa_lit.cli.step_cost import Batches, Cost, measure, release
from lrsa_lit.data import token_cache
from lrsa_lit.data.collate import collate_training
from lrsa_lit.data.module import QADataModule
from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone
from lrsa_lit.objectives.cached_teacher import Cached
from lrsa_lit.strategies import shards_weights
from lrsa_lit.tasks import LongContextQA

_log = logging.getLogger("lrsa_lit")
_GIB = 2**30
_FEW = ((2, 4), (1, 2))
"""Numbers of layers of the measured models; the second pair is used if four layers do not fit."""
_BATCHES = 1000
"""Number of batches whose lengths are read."""
_ANSWER = 32
"""Answer tokens of a synthetic batch."""
_TRAINER = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")
"""Settings of the trainer that affect the cost of a step."""


class Layers(NamedTuple):
    """How many layers of a model attend densely, and how many under the rule."""

    dense: int
    sparse: int


def estimate(task: LongContextQA, data: QADataModule, trainer: lightning.Trainer, settings: Mapping[str, Any]) -> Table:
    """Estimate the cost of a configured fit from a few layers, as a table.

    Args:
        task: the task, whose model is not loaded yet.
        data: its batches are used if it is tokenised already, and otherwise a synthetic batch with ``max_tokens`` per
            example.
        trainer: the trainer of the fit; it runs nothing.
        settings: the settings that the trainer was made with.

    Raises:
        UserError: this kind of fit cannot be estimated from a few layers on one device, or even these do not fit.
    """
    if shards_weights(trainer.strategy):
        reason = "a sharded model cannot be estimated; estimate one device without fsdp.yaml"
        raise UserError("--estimate", reason=reason)
    if task.backbone.quantization is not None:
        reason = "model.backbone.quantization cannot be estimated, because it needs the real weights"
        raise UserError("--estimate", reason=reason)
    if task.part is not None:
        reason = f"model.{'spectra' if task.head_gates is None else 'head_gates'} cannot be estimated"
        raise UserError("--estimate", reason=reason)
    batches, lengths = _batches(data)
    options = {name: settings[name] for name in _TRAINER if settings.get(name) is not None}
    cost, measured = cost_of(task, batches, options)
    passes, device = trainer.accumulate_grad_batches, trainer.strategy.root_device
    seconds = passes * cost.pass_seconds + cost.step_seconds
    tokens = passes * trainer.world_size * sum(map(_tokens, batches.typical)) / len(batches.typical)
    hours = seconds * trainer.max_steps / 3600 if trainer.max_steps > 0 else None
    name, free = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, _free(device)
    rest = cost.peak - cost.weights - cost.gradients - cost.optimizer
    table = Table(title="Estimate for one device", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{round(cost.parameters):,}")
    table.add_row("of them trained", f"{round(cost.trained):,}")
    table.add_row("weights", _size_text(cost.weights))
    table.add_row("gradients", _size_text(cost.gradients))
    table.add_row("optimizer", _size_text(cost.optimizer))
    table.add_row("activations and all else", _size_text(max(rest, 0)))
    table.add_row("peak", _size_text(cost.peak))
    table.add_row(f"free on {name}", f"{_size_text(free)}: {'fits' if cost.peak <= free else 'does NOT fit'}")
    table.add_row("tokens a step", f"{round(tokens):,}")
    table.add_row("seconds a step", f"{seconds:.3g}")
    table.add_row("tokens a second", f"{tokens / seconds:,.0f}")
    # Without validation and waiting for data.
    table.add_row("hours for all steps", "unknown" if hours is None else f"{hours:.2g}")
    layers = " and ".join(f"{sum(few)}" for few in measured)
    table.caption = (
        f"Measured on models of {layers} layers with random weights; {lengths}. Memory counts tensors only. "
        "Validation, checkpoints, waiting for data and communication between devices are not included."
    )
    return table


def cost_of(task: LongContextQA, batches: Batches, options: dict[str, Any]) -> tuple[Cost, list[Layers]]:
    """The cost of a step, extrapolated from models of a few layers, and their layers; arguments as of `measure`."""
    whole = _layers(task)
    measured = _measure_few(whole, lambda layers: measure(_shortened(task, layers), batches, options))
    return extrapolate(whole, measured), [*measured]


def extrapolate(whole: Layers, measured: Mapping[Layers, Cost]) -> Cost:
    """Extrapolate the cost of all layers from the costs of a few.

    Args:
        whole: the layers asked for.
        measured: the cost of ``whole`` itself; otherwise of two models that differ in one kind of layers and, if
            ``whole`` has both kinds, of a third model that differs from the first in the other kind.
    """
    if whole in measured:
        return measured[whole]
    (first, of_first), *others = measured.items()
    total = list(of_first)
    for other, of_other in others:
        kind = 0 if other.dense != first.dense else 1
        per_layer = [(b - a) / (other[kind] - first[kind]) for a, b in zip(of_first, of_other, strict=True)]
        total = [value + slope * (whole[kind] - first[kind]) for value, slope in zip(total, per_layer, strict=True)]
    return Cost(*total)


def _layers(task: LongContextQA) -> Layers:
    count = task.backbone.config.num_hidden_layers
    dense = count if task.train_config is None else len(task.train_config.dense_layers)
    return Layers(dense, count - dense)


def _measure_few(whole: Layers, measure: Callable[[Layers], Cost]) -> dict[Layers, Cost]:
    for few, more in _FEW:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            found, todo = {}, _to_measure(whole, few, more)
            for number, layers in enumerate(todo, 1):
                _log.info("Measuring a model of %d layers (%d of %d)", sum(layers), number, len(todo))
                found[layers] = measure(layers)
            return found
        # Only after the with block does nothing refer to the allocated tensors any more.
        release()
    mend = "lower data.init_args.batch_size or max_tokens, or set model.backbone.gradient_checkpointing"
    raise UserError("--estimate", reason=f"even {_FEW[-1][1]} layers do not fit on the device; {mend}")


def _to_measure(whole: Layers, few: int, more: int) -> list[Layers]:
    """Models whose differences give the cost of a layer of each kind; the whole model if that is no larger."""
    if sum(whole) <= more:
        return [whole]
    if whole.sparse == 0:
        return [Layers(few, 0), Layers(more, 0)]
    both = [Layers(more - few, few)] if whole.dense else []
    return [Layers(0, few), Layers(0, more), *both]


@dataclasses.dataclass(eq=False)
class _Short(Backbone):
    """A backbone with random weights and fewer layers."""

    layers: int = 0

    @functools.cached_property
    def _whole_config(self) -> Any:
        config = copy.deepcopy(super()._whole_config)
        text = config.get_text_config()
        text.num_hidden_layers = self.layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: self.layers]
        return config


def _shortened(task: LongContextQA, layers: Layers) -> LongContextQA:
    """The task with a model of few layers; the rest is as configured, except the learning rate's schedule."""
    short = copy.deepcopy(task)
    fields = {field.name: getattr(task.backbone, field.name) for field in dataclasses.fields(Backbone)}
    if (low_rank := task.backbone.low_rank) is not None:
        # Moments cover all layers, and cost nothing once the factors are made.
        fields["low_rank"] = dataclasses.replace(low_rank, whitening=None, sha256=None, dense_layers=())
    short.backbone = _Short(**fields | {"random_weights": True}, layers=sum(layers))
    if task.train_config is not None:
        rule = task.train_config
        if rule.head_top_k is not None:
            # A sparse layer's cost is linear in K, except for the launches of several groups of heads.
            dense, sparse = _layers(task)
            total = (dense + sparse) * mean_top_k(rule, dense + sparse) - dense * rule.lag_size
            rule = rule.replace(top_k=round(total / max(sparse, 1)))
        if rule.system is not None:
            rule = rule.replace(system=rule.system.of_layers(sum(layers)))
        short.train_config = short.lrsa = rule.replace(dense_layers=list(range(layers.dense)))
    short.make_scheduler = None
    for term in short.objective.terms:
        if isinstance(term.teacher, Cached):
            term.teacher.make_up(task.backbone.config.vocab_size)
    return short


def _batches(data: QADataModule) -> tuple[Batches, str]:
    """Batches like those of the fit, and a text that says where their lengths come from."""
    if not token_cache.is_built(data.folder("train")):
        example = Example(
            id="",
            input_ids=[5] * data.max_tokens,
            prompt_length=max(1, data.max_tokens - _ANSWER),
            gold_spans=[],
            answer_spans=[],
            answers=[""],
            match="any",
            rejected=[5] * min(_ANSWER, data.max_tokens - 1) if data.rejects else [],
        )
        batch = collate_training([example] * data.batch_size, pad_token_id=0)
        return Batches(batch, [batch]), f"the data is not tokenised yet, so each example has {data.max_tokens:,} tokens"
    data.setup("fit")
    found = sorted((batch for _, batch in zip(range(_BATCHES), data.train_dataloader(), strict=False)), key=_area)
    typical = [found[int(len(found) * part)] for part in (1 / 6, 1 / 2, 5 / 6)]
    return Batches(found[-1], typical), f"lengths of {len(found):,} batches of the data"


def _area(batch: Any) -> int:
    return int(batch["input_ids"].numel())


def _tokens(batch: Any) -> int:
    """Tokens without padding."""
    mask = batch.get("attention_mask")
    return _area(batch) if mask is None else int(mask.sum())


def _free(device: torch.device) -> int:
    """Bytes that are free for a fit now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size_text(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / 2**20:.1f} MiB"
