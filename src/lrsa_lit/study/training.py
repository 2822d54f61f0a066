"""Train a row: the command line's own task, trainer and order of the data, stopped and taken up again by the clock."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.checkpoints import AtomicCheckpointIO, GracefulStop, exit_codes
from lrsa_lit.data.collate import TrainBatch, collate_training
from lrsa_lit.data.order import Mixed, shares
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.data.policies import checked_policy
from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.models import Backbone
from lrsa_lit.models.backbone import LoRA
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.study import settings
from lrsa_lit.study.plan import Row
from lrsa_lit.study.tokens import TokenFile
from lrsa_lit.tasks import LongContextQA, TopKSchedule

_WARM_UP = 5
"""Batches that are left out of the measured speed: they compile kernels."""

_MULTIPLE = 64
"""What the length of batches of one length is a multiple of."""


class Batches(IterableDataset[TrainBatch]):
    """The training batches of a seed from some step on, without end: the same for every row with the same data.

    Where the row compiles its layers, all batches are as long as the longest example: each new length would be compiled
    anew, the second one for any length and slower. The rule and its K may change: no compiled layer depends on them.

    Args:
        files: of the data sets with a share, by name.
        row: whose shares and batch size they have.
        seed: the run's.
        pad_token_id: what fills rows.
    """

    def __init__(self, files: dict[str, TokenFile], row: Row, seed: int, pad_token_id: int) -> None:
        super().__init__()
        self.examples: list[Example] = [example for file in files.values() for example in file.examples]
        counts = tuple(len(file.examples) for file in files.values())
        quotas = shares([row.weights[name] for name in files], len(self.examples))
        lengths = [length for file in files.values() for length in file.lengths]
        self.plan = EpochPlan(lengths, checked_policy(row.batch_size, None, False), Mixed(counts, quotas))
        self.seed, self.pad_token_id, self.first = seed, pad_token_id, 0
        compiles = row.settings["model"]["backbone"].get("compile_layers")
        self.length = -(-max(lengths) // _MULTIPLE) * _MULTIPLE if compiles else 0

    def __iter__(self) -> Iterator[TrainBatch]:
        """From batch ``first`` on."""
        epoch, start = divmod(self.first, len(self.plan))
        while True:
            for batch in self.plan.batches(self.seed, epoch)[start:]:
                examples = [self.examples[position] for position in batch]
                yield collate_training(examples, self.pad_token_id, self.length)
            epoch, start = epoch + 1, 0


class Meter(lightning.Callback):
    """Measures a training, over the calls that it takes, and ends a call in time with a checkpoint.

    Args:
        checkpoint: where to leave it.
        out_of_time: asked after each optimizer step.
        settle: called before the first measured batch of a call; returns when nothing else is at work.

    Attributes:
        losses: answer loss of each batch.
        tokens: of the batches behind the first few of each call, padding included.
        seconds: that these took.
        wall: seconds of the training, compilation included.
    """

    def __init__(self, checkpoint: Path, out_of_time: Callable[[], bool], settle: Callable[[], None]) -> None:
        self.checkpoint, self.out_of_time, self.settle = checkpoint, out_of_time, settle
        self.losses: list[float] = []
        self.tokens, self.seconds, self.wall = 0, 0.0, 0.0
        self._began = 0.0
        self._pending: list[torch.Tensor] = []
        self._steps, self._since, self._queued = 0, 0.0, 0

    @property
    def tokens_per_second(self) -> float | None:
        """None before there is something to measure."""
        return self.tokens / self.seconds if self.seconds else None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"losses": self.losses, "tokens": self.tokens, "seconds": self.seconds, "wall": self.wall}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a checkpoint has kept."""
        self.losses = list(state_dict["losses"])
        self.tokens, self.seconds, self.wall = (state_dict[name] for name in ("tokens", "seconds", "wall"))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch; stop with a checkpoint when the time is over."""
        self._steps += 1
        self._pending.append(trainer.callback_metrics["train/loss"].detach().clone())
        self._queued += batch["input_ids"].numel()
        last = trainer.global_step == trainer.max_steps
        # Gradients that are still being accumulated would be lost.
        whole = self._steps % trainer.accumulate_grad_batches == 0
        stop = whole and not last and self.out_of_time()
        if self._steps == _WARM_UP:
            self.settle()
        if self._steps == _WARM_UP or self._steps % 10 == 0 or last or stop:
            self._read(pl_module)
        if stop:
            trainer.save_checkpoint(self.checkpoint, weights_only=False)
            trainer.should_stop = True

    def _read(self, pl_module: Any) -> None:
        """Wait for the device, which steps between do not, and take the time."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.wall += now - self._began
        self._began = now
        if self._steps > _WARM_UP:
            self.tokens += self._queued
            self.seconds += now - self._since
        self._since, self._queued = now, 0
        self.losses += [float(loss) for loss in self._pending]
        self._pending.clear()


class StopAfterStep(GracefulStop):
    """Leaves it to the meter to end a training that is told to stop: after a whole step, and with a checkpoint."""

    def _stop_if_asked(self, trainer: lightning.Trainer) -> None:
        pass


def task_of(row: Row, source: str | None = None) -> LongContextQA:
    """The row's task, not yet loaded.

    Args:
        row: the row.
        source: where the same base LLM lies on this machine; None: where the row says.

    Raises:
        UserError: a setting of the row is not allowed.
    """
    model = row.settings["model"]
    given = dict(model["backbone"])
    if source is not None:
        given |= {"source": source, "sha256": None}
    lora = None if given.get("lora") is None else settings.called("model.backbone.lora", LoRA, given["lora"])
    base = {name: settings.made(value, Compressor) for name, value in model["lrsa"].items()}
    attention = model.get("train_attention", {})
    attention = (
        None if attention is None else {name: settings.made(value, Compressor) for name, value in attention.items()}
    )
    return LongContextQA(
        backbone=settings.called("model.backbone", Backbone, {**given, "lora": lora}),
        lrsa=LRSAConfig().replace(**base),
        optimizer=settings.made(model["optimizer"], Optimizer, partial=True),
        lr_scheduler=settings.made(model.get("lr_scheduler"), LRScheduler, partial=True),
        train_attention=attention,
        train_top_k=settings.made(model.get("train_top_k"), TopKSchedule),
        max_new_tokens=model.get("max_new_tokens", 32),
    )


def digest_of_weights(weights: dict[str, Tensor]) -> str:
    """Twelve hex digits of the names and of every bit."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def train(
    row: Row,
    seed: int,
    task: LongContextQA,
    files: dict[str, TokenFile],
    checkpoint: Path,
    out_of_time: Callable[[], bool],
    settle: Callable[[], None],
) -> tuple[Meter, int, int | None]:
    """Train a row, from its checkpoint on if there is one, until it is done or out of time.

    Args:
        row: the row.
        seed: decides the order of the data, and all that is drawn.
        task: the row's task.
        files: of the data sets that it trains on.
        checkpoint: where a training that is out of time leaves its weights, optimizer and step.
        out_of_time: asked after each step.
        settle: called before speed is measured; returns when nothing else is at work.

    Returns:
        What was measured, the steps that are done in all, and the signal that ended the training, if one has.
        ``task.model`` has the weights.
    """
    lightning.seed_everything(seed, verbose=False)
    batches = Batches(files, row, seed, task.tokenizer.pad_token_id)
    stop = StopAfterStep()
    meter = Meter(checkpoint, lambda: stop.asked is not None or out_of_time(), settle)
    resumed = checkpoint.exists()
    if resumed:
        # Mapped: the trainer reads the weights.
        steps = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        batches.first = _accumulated(row) * int(steps)
    with _quiet(), exit_codes(), stop.listening():
        trainer = _trainer(row, [meter, stop])
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(task, loader, ckpt_path=str(checkpoint) if resumed else None, weights_only=True)
    return meter, trainer.global_step, stop.asked


def _accumulated(row: Row) -> int:
    """Batches of an optimizer step."""
    return row.settings["trainer"].get("accumulate_grad_batches") or 1


def _trainer(row: Row, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    """A trainer that does and writes nothing beside the training.

    Raises:
        UserError: it refuses a setting of the row.
    """
    asked = row.settings["trainer"]
    try:
        return lightning.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=-1,
            max_steps=row.steps,
            precision=asked.get("precision"),
            gradient_clip_val=asked.get("gradient_clip_val"),
            accumulate_grad_batches=_accumulated(row),
            log_every_n_steps=row.steps + 1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"rows.{row.name}.trainer: {message_of(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on a loader without workers and a trainer without a logger."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(before)
