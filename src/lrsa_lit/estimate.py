"""``lrsa fit … --estimate``: what memory and time a fit will take, measured on a few layers of its model.

Every layer of a kind costs the same. So the configured training runs for some steps on models of the configured width
with two and four layers and random weights, and the rest follows: seconds, and the peaks of memory in the passes and in
the optimizer's step, grow linearly with the layers. Nothing is loaded but the model's config and tokenizer, nothing is
recorded or written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import lightning
import torch
from lightning.pytorch import Callback
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from lrsa_lit.data import cache
from lrsa_lit.data.collate import collate
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone
from lrsa_lit.tasks import LongContextQA

_GIB = 2**30
_FEW = ((2, 4), (1, 2))
"""Layers of the models that are measured; the second pair where four do not fit."""

_REPEATS = 4
"""Steps on each batch that is timed; the first one may prepare what the others use, the fastest of those counts."""

_BATCHES = 1000
"""Batches of the data that are looked at for their lengths."""

_ANSWER = 32
"""Answer tokens of a made-up batch."""

_TRAINER = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark")
"""Settings of the trainer that decide what a step costs."""


class Layers(NamedTuple):
    """How many layers of a model attend densely, and how many under the rule."""

    dense: int
    sparse: int


class Cost(NamedTuple):
    """What training costs on one device; seconds, bytes and numbers of weights.

    Attributes:
        parameters: weights of the model.
        trained: those that are trained.
        weights: bytes of the weights.
        gradients: bytes of the gradients.
        optimizer: bytes of the optimizer's state.
        peak_passes: most bytes at a time during forward and backward pass.
        peak_step: most bytes at a time during the optimizer's step.
        pass_seconds: of a forward and backward pass over a batch.
        step_seconds: of the optimizer's step, clipping included.
    """

    parameters: float
    trained: float
    weights: float
    gradients: float
    optimizer: float
    peak_passes: float
    peak_step: float
    pass_seconds: float
    step_seconds: float

    @property
    def peak(self) -> float:
        """Most bytes at a time."""
        return max(self.peak_passes, self.peak_step)


class Batches(NamedTuple):
    """Batches to measure with: the largest for memory, some of ordinary sizes for time."""

    largest: Any
    typical: list[Any]


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
    from lrsa_lit.strategies import FullySharded

    if isinstance(trainer.strategy, FullySharded):
        raise UserError("--estimate: a sharded model is not estimated; see what one device needs without fsdp.yaml")
    if task.backbone.quantization is not None:
        raise UserError("--estimate: model.backbone.quantization is not estimated; it needs the weights themselves")


def _batches(data: QADataModule) -> tuple[Batches, str]:
    """Batches as the fit will see them, and where they are from."""
    if not cache.is_built(data.folder("train")):
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
        _release()
    raise UserError(
        f"--estimate: even {_FEW[-1][1]} layers do not fit on the device; lower data.init_args.batch_size or "
        "max_tokens, or set model.backbone.gradient_checkpointing"
    )


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def measure(task: LongContextQA, batches: Batches, options: dict[str, Any]) -> Cost:
    """Train for some steps, with all layers that the task's model has; the arguments are those of :func:`cost_of`."""
    probe = _Probe()
    # Gradients and the optimizer's state exist from the second step on.
    planned = [batches.largest] * 2 + [batch for batch in batches.typical for _ in range(_REPEATS)]
    trainer = lightning.Trainer(
        **options,
        devices=1,
        max_steps=len(planned),
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        trainer.fit(task, DataLoader(cast("Dataset[Any]", planned), batch_size=None))
    cost = probe.cost(task, trainer)
    task.model = None
    del trainer
    _release()
    return cost


class _Probe(Callback):
    """Measures memory in the second step, and the seconds of those that follow."""

    def __init__(self) -> None:
        self.passes: list[float] = []
        self.steps: list[float] = []
        self.peaks: list[int] = []
        self._memory: _Memory | None = None
        self._since = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._index = batch_idx
        if batch_idx == 1:
            self._memory = _GPUMemory() if pl_module.device.type == "cuda" else _CPUMemory(pl_module, trainer)
            self._memory.start()
        self._since = _now(pl_module.device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        now = _now(pl_module.device)
        self.passes.append(now - self._since)
        self._since = now
        if self._index == 1:
            assert self._memory is not None
            self.peaks.append(self._memory.peak())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(_now(pl_module.device) - self._since)
        if batch_idx == 1:
            assert self._memory is not None
            self.peaks.append(self._memory.peak())
            self._memory.stop()

    def cost(self, task: LongContextQA, trainer: lightning.Trainer) -> Cost:
        """What was measured."""
        weights = list(task.model.parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        state = [value for of in trainer.optimizers[0].state.values() for value in of.values()]
        return Cost(
            parameters=sum(weight.numel() for weight in weights),
            trained=sum(weight.numel() for weight in trained),
            weights=_size(weights),
            gradients=_size(trained),
            optimizer=_size(value for value in state if isinstance(value, Tensor)),
            peak_passes=self.peaks[0],
            peak_step=self.peaks[1],
            pass_seconds=_seconds(self.passes[2:]),
            step_seconds=_seconds(self.steps[2:]),
        )


def _seconds(measured: list[float]) -> float:
    """Mean over the batches of the fastest repeat."""
    fastest = [min(measured[first + 1 : first + _REPEATS]) for first in range(0, len(measured), _REPEATS)]
    return sum(fastest) / len(fastest)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _GPUMemory:
    """What PyTorch's allocator has handed out."""

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Most bytes at a time since the last call."""
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return found

    def stop(self) -> None:
        """There is nothing to take back."""


class _CPUMemory(TorchDispatchMode):
    """The storages of all tensors that operations return; the process itself is too coarse a measure.

    Buffers within operations do not count. Backward passes of a CPU run in the thread that asks for them, and so under
    this mode, too.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        super().__init__()
        self._held: set[int] = set()
        self._now = self._peak = 0
        state = [value for of in trainer.optimizers[0].state.values() for value in of.values()]
        gradients = [weight.grad for weight in module.parameters()]
        self._note([*module.parameters(), *module.buffers(), *gradients, *state])

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def peak(self) -> int:
        """Most bytes at a time since the last call."""
        found, self._peak = self._peak, self._now
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self._note(torch.utils._pytree.tree_leaves(made))
        return made

    def _note(self, values: Sequence[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._held:
                self._held.add(key)
                self._now += size
                self._peak = max(self._peak, self._now)
                weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._now -= size


_Memory = _GPUMemory | _CPUMemory


def _free(device: torch.device) -> int:
    """Bytes that a fit could have now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
