"""The cost of all layers of a model from that of a few."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lrsa_lit.cli.estimate.memory import release
from lrsa_lit.cli.estimate.probe import Batches, Cost, measure
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone
from lrsa_lit.tasks import LongContextQA

_FEW = ((2, 4), (1, 2))
"""Layers of the models that are measured; the second pair where four do not fit."""


class Layers(NamedTuple):
    """How many layers of a model attend densely, and how many under the rule."""

    dense: int
    sparse: int


def cost_of(task: LongContextQA, batches: Batches, options: dict[str, Any]) -> tuple[Cost, list[Layers]]:
    """The cost of training a task's model, from a few of its layers; and the layers of the models that were run.

    Args:
        task: configured, its model not loaded yet.
        batches: to measure with.
        options: for the Trainer of Lightning that runs them.

    Raises:
        UserError: not even a few layers fit on the device.
    """
    whole = _layers(task)
    measured = _measure_few(whole, lambda layers: measure(_shortened(task, layers), batches, options))
    return extrapolate(whole, measured), list(measured)


def extrapolate(whole: Layers, measured: dict[Layers, Cost]) -> Cost:
    """The cost of all layers from that of a few.

    Args:
        whole: the layers asked for.
        measured: of ``whole`` itself; else of two models that differ in one kind of layers and, where ``whole`` has
            both kinds, of a third one that differs from the first in the other kind.
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
    if task.train_config is None:
        return Layers(count, 0)
    dense = len(task.train_config.dense_layers)
    return Layers(dense, count - dense)


def _measure_few(whole: Layers, measure: Callable[[Layers], Cost]) -> dict[Layers, Cost]:
    for few, more in _FEW:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return {layers: measure(layers) for layers in _to_measure(whole, few, more)}
        # Only now is nobody left who refers to what was allocated.
        release()
    raise UserError(
        "--estimate",
        reason=f"even {_FEW[-1][1]} layers do not fit on the device; lower data.init_args.batch_size or max_tokens, "
        "or set model.backbone.gradient_checkpointing",
    )


def _to_measure(whole: Layers, few: int, more: int) -> list[Layers]:
    """Models that tell a layer of each kind from all else; the whole model where that is no larger."""
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
    """The task over a model of few layers; all else as configured, the learning rate's schedule excepted."""
    short = copy.deepcopy(task)
    fields = {field.name: getattr(task.backbone, field.name) for field in dataclasses.fields(Backbone)}
    short.backbone = _Short(**fields | {"random_weights": True}, layers=sum(layers))
    if task.train_config is not None:
        short.train_config = short.lrsa = task.train_config.replace(dense_layers=list(range(layers.dense)))
    short.make_scheduler = None
    return short
