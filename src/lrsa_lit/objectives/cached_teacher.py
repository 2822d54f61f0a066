"""A teacher whose outputs are read from the disk.

Dimensions: B rows, T tokens per row, n cached tokens per position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lrsa_lit.attention import LAYOUT
from lrsa_lit.errors import UserError
from lrsa_lit.objectives.distribution import Distribution
from lrsa_lit.objectives.positions import starts_of
from lrsa_lit.objectives.teacher_cache import Kept, MadeUp, Place, write
from lrsa_lit.objectives.teachers import Loaded, Teacher, TeacherPass

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lrsa_lit.data.collate import TrainBatch
    from lrsa_lit.data.module import QADataModule
    from lrsa_lit.models.flops import Shape
    from lrsa_lit.models.head import Head


@dataclass(frozen=True)
class Cached(Teacher):
    """A teacher whose most likely tokens are on the disk; the model is not loaded.

    Args:
        model: the teacher model.
        n: tokens per position.
        temperature: the divisor of its logits.
    """

    model: Loaded
    n: int
    temperature: float = 1.0
    _opened: list[Kept | MadeUp] = field(default_factory=list, compare=False, repr=False)

    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> TeacherPass:
        """Read the batch's examples and copy them to the device without waiting."""
        if not self._opened:
            raise UserError("teacher", self.model.source, reason="is cached, but its cache has not been opened")
        kept, ids = self._opened[0], batch["input_ids"]
        read = [kept.of(at, size.tokens - 1) for at, size in zip(batch["position"], batch["sizes"], strict=True)]
        tokens, logs = (_spread(parts, starts_of(batch), ids) for parts in zip(*read, strict=True))
        layout = inputs.get(LAYOUT)
        if layout is not None and layout.shared is not None:
            # Only the rows of this device's tokens.
            tokens, logs = (layout.shared.own(rows.unflatten(0, ids.shape)).flatten(0, 1) for rows in (tokens, logs))
        return CachedPass(tokens, logs, kept.width, {})

    def shape(self, of_model: Shape) -> Shape | None:
        """None, because reading computes nothing."""
        return None

    def check(self, tokenizer: Any) -> None:
        """Check the teacher model."""
        self.model.check(tokenizer)

    def open(self, data: str, vocabulary: int) -> None:
        """Open the cache; a UserError if it is damaged or is for other data, another teacher or fewer tokens."""
        if self._opened:
            return
        try:
            self._opened.append(self._place(data, vocabulary).open(min(self.n, vocabulary)))
        except UserError as error:
            if error.field == "teacher" and error.value is None:
                error.value = self.model.source
            raise

    def make_up(self, vocabulary: int) -> None:
        """Use made-up values, to measure training steps."""
        self._opened[:] = [MadeUp(min(self.n, vocabulary), vocabulary)]

    def write(
        self,
        data: QADataModule,
        vocabulary: int,
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> Path:
        """Run the teacher over the training split and write the cache that :meth:`open` reads.

        Args:
            data: the data, whose training split must be prepared; ``batch_size`` examples run at a time.
            vocabulary: rows of the trained model's head.
            device: the device to run on.
            context: a context for the passes, such as the trainer's precision.

        Returns:
            The folder. An existing one is kept unless it is damaged.
        """
        place = self._place(data.training_fingerprint, vocabulary)
        return write(place, min(self.n, vocabulary), self.model, data, device, context)

    def _place(self, data: str, vocabulary: int) -> Place:
        return Place(data, self.model.digest(), self.temperature, vocabulary)


@dataclass(frozen=True)
class CachedPass(TeacherPass):
    """The cached outputs for a batch.

    Attributes:
        tokens: (B T, n), int32, or int16 with the bits of uint16, which PyTorch hardly supports.
        logs: (B T, n + 1) float16, log-probabilities.
        width: the size of the vocabulary.
    """

    tokens: Tensor
    logs: Tensor
    width: int
    layers: dict[int, Tensor]

    def rows(self, where: Tensor) -> tuple[Tensor, ...]:
        """Tokens and log-probabilities."""
        return self.tokens[where], self.logs[where]

    def distributions(self, own: Head, temperature: float, top_n: int | None) -> Callable[..., Distribution]:
        """The distributions over ``top_n`` tokens; additional cached tokens are added to the rest."""

        def taught(_: int, tokens: Tensor, logs: Tensor) -> Distribution:
            tokens = tokens[:, :top_n]
            # Rounded to float16, probabilities no longer sum to 1.
            logs = log_softmax(logs.float(), dim=1)
            by_themselves, others = logs[:, : tokens.shape[1]], logs[:, tokens.shape[1] :]
            logs = torch.cat([by_themselves, torch.logsumexp(others, dim=1, keepdim=True)], dim=1)
            numbers = tokens.long() & 0xFFFF if tokens.dtype == torch.int16 else tokens.long()
            return Distribution(logs, self.width, numbers)

        return taught


def _spread(parts: Sequence[Any], starts: Sequence[int], ids: Tensor) -> Tensor:
    """(B T, …) on the device of ``ids``, with each example's rows from its start on; other rows are arbitrary."""
    first = parts[0].view(np.int16) if parts[0].dtype == np.uint16 else parts[0]
    dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype
    # A copy from pageable memory may wait for the device.
    rows = torch.empty((ids.numel(), first.shape[1]), dtype=dtype, pin_memory=ids.device.type == "cuda")
    into = rows.numpy()
    for start, part in zip(starts, parts, strict=False):
        into[start : start + len(part)] = part.view(first.dtype)
    return rows.to(ids.device, non_blocking=True)
