"""The positions of a batch that have a loss. They are computed on the host, so training never waits for the device."""

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
    """The positions of a batch, numbered through all its rows (B T).

    A position predicts the next token, so an example's last position predicts nothing. If several devices share the
    rows, positions are numbered through this device's parts of the rows.

    Args:
        batch: the training batch.
        seed: the seed of the run.
        step: the optimizer step, from 0.
        shared: how devices share the rows, if they do.
    """

    batch: TrainBatch
    seed: int
    step: int
    shared: SharedRows | None = None

    def targets(self) -> Tensor:
        """(B T,) int64: the token after each position; the batch's last position gets the batch's first token."""
        behind = self.batch["input_ids"].flatten().roll(-1)
        if self.shared is None:
            return behind
        return self.shared.own(behind.view_as(self.batch["input_ids"])).flatten()

    def answers(self) -> Tensor:
        """(M,) int64: the positions that predict a token of an answer."""
        return self._answers

    def answered(self) -> Numbers:
        """(M,): for each of :meth:`answers`, the index of its example in the batch."""
        counts = [len(_before(spans)) for spans in self._learnt]
        held, _ = self._held(self._joined(lambda size, name, answers: answers))
        return np.repeat(np.arange(len(counts)), counts)[held]

    @functools.cached_property
    def _answers(self) -> Tensor:
        # Cached, because several terms of a step need them and each copy to the device costs a launch.
        return self._of_each(lambda size, name, answers: answers)

    def pairs(self) -> tuple[Tensor, list[int]]:
        """The positions of the chosen and then of the rejected answer, for each example that has a rejected one.

        Returns:
            (M,) int64 positions, and the number of positions of each answer: two numbers per pair.
        """
        parts = []
        learnt, rejected = self._learnt, self.batch.get("rejected", [None] * len(self.batch["id"]))
        for start, spans, other in zip(starts_of(self.batch), learnt, rejected, strict=False):
            if other is not None:
                parts += [start + _before(spans), _before([other])]
        return self._on_device(_join(parts)), list(map(len, parts))

    def drawn(self, count: Callable[[ExampleSize], int], name: str, *, besides_answers: bool = False) -> Tensor:
        """(M,) int64: positions that predict a token, drawn at random in each step.

        The positions of an example depend only on the run's seed, the step, the example and ``name``, not on the rest
        of the batch.

        Args:
            count: how many positions to draw from an example.
            name: distinguishes the objectives of a run.
            besides_answers: draw only positions that predict no token of an answer.
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
        """The positions that ``within`` returns for each example's size, id and answer positions, on the device."""
        return self._on_device(self._held(self._joined(within))[1])

    def _joined(self, within: Callable[[ExampleSize, str, Numbers], Numbers]) -> Numbers:
        """The positions of all examples, including those on other devices."""
        sizes, names = self.batch["sizes"], self.batch["id"]
        named = zip(starts_of(self.batch), sizes, names, map(_before, self._learnt), strict=False)
        return _join([start + within(size, name, answers) for start, size, name, answers in named])

    def _held(self, places: Numbers) -> tuple[Flags, Numbers]:
        """Which of these positions are on this device, (M,) bool, and their numbers among the device's own."""
        return (np.ones(len(places), dtype=bool), places) if self.shared is None else self.shared.held(places)

    @property
    def _learnt(self) -> Sequence[Sequence[Span]]:
        sizes = self.batch["sizes"]
        return self.batch.get("learnt") or [[(size.tokens - size.answer, size.tokens)] for size in sizes]

    def _on_device(self, joined: Numbers) -> Tensor:
        device, found = self.batch["input_ids"].device, torch.from_numpy(joined)
        # A copy from pageable memory may wait for the device.
        return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)


def _join(parts: Sequence[Numbers]) -> Numbers:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _before(spans: Sequence[Span]) -> Numbers:
    """The positions that predict the tokens in [start, end) of an example; its first token is never predicted."""
    return np.concatenate([np.arange(max(start, 1) - 1, end - 1) for start, end in spans])


def starts_of(batch: TrainBatch) -> Sequence[int]:
    """Where each example starts among the batch's positions (B T); one more number may follow the last start."""
    rows, width = batch["input_ids"].shape
    return batch["boundaries"] or range(0, rows * width, width)
