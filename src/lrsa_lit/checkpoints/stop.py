"""Ctrl-C and SIGTERM end a fit between two batches, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lrsa_lit.checkpoints.exact_state import ExactState


class StoppedByUser(KeyboardInterrupt):
    """Ctrl-C, between two batches."""


class Terminated(SIGTERMException):
    """SIGTERM, between two batches: pre-emption, for example."""


class GracefulStop(Callback):
    """Turn the first Ctrl-C or SIGTERM of a fit into an exception between two batches, of validation as well.

    A second Ctrl-C stops at once, as does any signal outside of the fit. Of several processes, one that is told is
    enough. Signals are heeded within :meth:`listening`.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._listening = self._fitting = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals within a block, on the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._asked, self._process, self._listening = None, os.getpid(), True
        for number, handler in before.items():
            # A job in the background of a shell ignores Ctrl-C and shall go on doing so.
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the next batch."""
        self._fitting = True
        if self._listening and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            # In the place of Lightning's handler, which would end the fit between the batches of one step.
            signal.signal(signal.SIGTERM, self._handle)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop before a batch: what the one before has logged is recorded by now."""
        self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop within a validation, which a resumed run does again."""
        if self._fitting:
            self._stop_if_asked(trainer)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Too late to stop between batches."""
        self._fitting = False

    on_exception = on_train_end

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A data loader's worker: the main process decides, and needs its batches until then.
            return
        if self._fitting and self._asked is None:
            self._asked = number
            if number == signal.SIGINT:
                # Nothing that has locks or buffers: this may have interrupted it.
                os.write(2, b"\nlrsa: stopping after this batch; Ctrl-C again stops at once\n")
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._fitting:
            raise Terminated

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = self._asked or 0
        if trainer.world_size > 1:
            # Lightning, too, asks about SIGTERM before each batch where there are several processes.
            of_all = torch.tensor(asked, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX)
            asked = int(of_all)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if asked and all(callback.at_hand for callback in callbacks if isinstance(callback, ExactState)):
            self._asked = None
            raise Terminated if asked == signal.SIGTERM else StoppedByUser
