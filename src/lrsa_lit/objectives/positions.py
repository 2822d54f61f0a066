"""Which positions of a batch have a loss. All of it is known on the host, so no step waits for the device."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lrsa_lit.context_parallel import SharedRows
    from lrsa_lit.context_parallel.shares import Flags
    from lrsa_lit.data.collate import ExampleSize, TrainBatch
    from lrsa_lit.data.tokenization import Span

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Positions:
    """The positions of a batch, counted through all of its rows (B T).

    A position predicts the token behind it, so an example's last one predicts nothing. Where devices share the rows,
    these are the positions among this one's tokens, counted through its parts of the rows.

    Args:
        batch: to train on.
        seed: of the run.
        step: of the optimizer, from 0.
        shared: the rows, if devices share them.
    """

    batch: TrainBatch
    seed: int
    step: int
    shared: SharedRows | None = None

    def targets(self) -> Tensor:
        """(B T,) int64: the token behind each position, of the batch's last one the first."""
        behind = self.batch["input_ids"].flatten().roll(-1)
        if self.shared is None:
            return behind
        return self.shared.own(behind.view_as(self.batch["input_ids"])).flatten()

    def answers(self) -> Tensor:
        """(M,) int64: those that predict a token of an answer."""
        return self._answers

    def answered(self) -> Numbers:
        """(M,): the number of the example whose answer each of :meth:`answers` is in."""
        counts = [len(_before(spans)) for spans in self._learnt]
        held, _ = self._held(self._joined(lambda size, name, answers: answers))
        return np.repeat(np.arange(len(counts)), counts)[held]

    @functools.cached_property
    def _answers(self) -> Tensor:
        # Several terms of a step ask for them, and each copy to the device is a launch.
        return self._of_each(lambda size, name, answers: answers)

    def pairs(self) -> tuple[Tensor, list[int]]:
        """Of each example that rejects an answer, those that predict its own, then those that predict the rejected one.

        Returns:
            (M,) int64 positions, and how many each answer has: two numbers a pair.
        """
        parts = []
        learnt, rejected = self._learnt, self.batch.get("rejected", [None] * len(self.batch["id"]))
        for start, spans, other in zip(starts_of(self.batch), learnt, rejected, strict=False):
            if other is not None:
                parts += [start + _before(spans), _before([other])]
        return self._on_device(_join(parts)), list(map(len, parts))

    def drawn(self, count: Callable[[ExampleSize], int], name: str, *, besides_answers: bool = False) -> Tensor:
        """(M,) int64: some of those that predict a token, drawn anew in each step.

        What is drawn of an example follows from the run's seed, the step, the example and ``name`` alone, whatever else
        is in the batch.

        Args:
            count: how many of an example.
            name: tells objectives of one run apart.
            besides_answers: draw among those that predict no token of an answer.
        """

        def draw(size: ExampleSize, record: str, answers: Numbers) -> Numbers:
            among = np.arange(size.tokens - 1)
            if besides_answers:
                among = np.delete(among, answers)
            wanted = count(size)
            if wanted >= len(among):
                return among
            seed = hashlib.sha256(f"{self.seed}:{self.step}:{record}:{name}".encode()).digest()
            chosen = np.random.default_rng(list(seed)).choice(len(among), wanted, replace=False, shuffle=False)
            return among[np.sort(chosen)]

        return self._of_each(draw)

    def _of_each(self, within: Callable[[ExampleSize, str, Numbers], Numbers]) -> Tensor:
        """Positions of each example, by its size, its id and those that predict its answers."""
        return self._on_device(self._held(self._joined(within))[1])

    def _joined(self, within: Callable[[ExampleSize, str, Numbers], Numbers]) -> Numbers:
        """Those of all examples, whoever holds them."""
        sizes, names = self.batch["sizes"], self.batch["id"]
        named = zip(starts_of(self.batch), sizes, names, map(_before, self._learnt), strict=False)
        return _join([start + within(size, name, answers) for start, size, name, answers in named])

    def _held(self, places: Numbers) -> tuple[Flags, Numbers]:
        """Which of some places this device holds, (M,) bool, and where those are among its own."""
        return (np.ones(len(places), dtype=bool), places) if self.shared is None else self.shared.held(places)

    @property
    def _learnt(self) -> Sequence[Sequence[Span]]:
        sizes = self.batch["sizes"]
        return self.batch.get("learnt") or [[(size.tokens - size.answer, size.tokens)] for size in sizes]

    def _on_device(self, joined: Numbers) -> Tensor:
        device, found = self.batch["input_ids"].device, torch.from_numpy(joined)
        # From pageable memory a copy may wait for the device.
        return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


def _join(parts: Sequence[Numbers]) -> Numbers:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _before(spans: Sequence[Span]) -> Numbers:
    """The positions that predict the tokens at [start, end) of an example, whose first token nothing predicts."""
    return np.concatenate([np.arange(max(start, 1) - 1, end - 1) for start, end in spans])


def starts_of(batch: TrainBatch) -> Sequence[int]:
    """Where each example of a batch starts among all of its positions (B T); after the last one may be one more."""
    rows, width = batch["input_ids"].shape
    return batch["boundaries"] or range(0, rows * width, width)
