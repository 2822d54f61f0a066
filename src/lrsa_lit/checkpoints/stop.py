"""End a fit between two batches, with a checkpoint, on Ctrl-C or SIGTERM."""

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
    """Ctrl-C was pressed; raised between two batches."""


class Terminated(SIGTERMException):
    """SIGTERM was received, for example at pre-emption; raised between two batches."""


class GracefulStop(Callback):
    """Turn the first Ctrl-C or SIGTERM in a fit into an exception between two batches, including validation batches.

    A second Ctrl-C stops at once, as does any signal outside the fit. If there are several processes, it is enough that
    one of them gets the signal. Signals are handled within :meth:`listening`.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._listening = self._fitting = False
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals in a with block on the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._asked, self._process, self._listening = None, os.getpid(), True
        for number, handler in before.items():
            # A shell's background job ignores Ctrl-C and must continue to do so.
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, signals wait for the next batch."""
        self._fitting = True
        if self._listening and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            # Replaces Lightning's handler, which would end the fit between the batches of one step.
            signal.signal(signal.SIGTERM, self._handle)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop before a batch, when the previous batch's metrics are recorded."""
        self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop within a validation, which a resumed run repeats."""
        if self._fitting:
            self._stop_if_asked(trainer)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """From now on, signals stop at once, because there are no more batches."""
        self._fitting = False

    on_exception = on_train_end

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # In a data-loader worker, ignore the signal: the main process decides, and needs the worker's batches.
            return
        if self._fitting and self._asked is None:
            self._asked = number
            if number == signal.SIGINT:
                # No function with locks or buffers, because the signal may have interrupted it.
                os.write(2, b"\nlrsa: stopping after this batch; Ctrl-C again stops at once\n")
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._fitting:
            raise Terminated

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = self._asked or 0
        if trainer.world_size > 1:
            # With several processes, Lightning also checks for SIGTERM before each batch.
            of_all = torch.tensor(asked, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX)
            asked = int(of_all)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if asked and all(callback.at_hand for callback in callbacks if isinstance(callback, ExactState)):
            self._asked = None
            raise Terminated if asked == signal.SIGTERM else StoppedByUser
