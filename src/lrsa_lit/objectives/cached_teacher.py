"""A teacher that is read from the disk.

Dimensions: B rows, T tokens of each, n tokens that are kept of a position.
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
    """A teacher whose most likely tokens are on the disk; it is not loaded.

    Args:
        model: the teacher.
        n: how many of a position.
        temperature: that its logits are divided by.
    """

    model: Loaded
    n: int
    temperature: float = 1.0
    _opened: list[Kept | MadeUp] = field(default_factory=list, compare=False, repr=False)

    def run(self, model: Any, batch: TrainBatch, inputs: Mapping[str, Any], layers: Sequence[int]) -> TeacherPass:
        """What is kept of the batch's examples, sent to its device without waiting for it."""
        if not self._opened:
            raise UserError("teacher", self.model.source, reason="is cached, and the cache is not open for any data")
        kept, ids = self._opened[0], batch["input_ids"]
        read = [kept.of(at, size.tokens - 1) for at, size in zip(batch["position"], batch["sizes"], strict=True)]
        tokens, logs = (_spread(parts, starts_of(batch), ids) for parts in zip(*read, strict=True))
        layout = inputs.get(LAYOUT)
        if layout is not None and layout.shared is not None:
            # Those of this device's tokens.
            tokens, logs = (layout.shared.own(rows.unflatten(0, ids.shape)).flatten(0, 1) for rows in (tokens, logs))
        return CachedPass(tokens, logs, kept.width, {})

    def shape(self, of_model: Shape) -> Shape | None:
        """None: reading is no arithmetic."""
        return None

    def check(self, tokenizer: Any) -> None:
        """That of the model."""
        self.model.check(tokenizer)

    def open(self, data: str, vocabulary: int) -> None:
        """As :class:`Teacher` has it; a UserError for other data, another teacher, fewer tokens, or damage."""
        if self._opened:
            return
        try:
            self._opened.append(self._place(data, vocabulary).open(min(self.n, vocabulary)))
        except UserError as error:
            if error.field == "teacher" and error.value is None:
                error.value = self.model.source
            raise

    def make_up(self, vocabulary: int) -> None:
        """Teach anything, to measure steps with."""
        self._opened[:] = [MadeUp(min(self.n, vocabulary), vocabulary)]

    def write(
        self,
        data: QADataModule,
        vocabulary: int,
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> Path:
        """Run the model over the training split and keep what :meth:`open` looks for.

        Args:
            data: its training split is prepared; ``batch_size`` examples are run at a time.
            vocabulary: rows of the trained model's head.
            device: to run on.
            context: of the passes, such as the trainer's precision.

        Returns:
            The folder; one that is there already is left alone, unless it is damaged.
        """
        place = self._place(data.training_fingerprint, vocabulary)
        return write(place, min(self.n, vocabulary), self.model, data, device, context)

    def _place(self, data: str, vocabulary: int) -> Place:
        return Place(data, self.model.digest(), self.temperature, vocabulary)


@dataclass(frozen=True)
class CachedPass(TeacherPass):
    """What is kept of a batch.

    Attributes:
        tokens: (B T, n), int32, or int16 whose bits are those of uint16, of which PyTorch knows little.
        logs: (B T, n + 1) float16.
        width: of the vocabulary.
    """

    tokens: Tensor
    logs: Tensor
    width: int
    layers: dict[int, Tensor]

    def rows(self, where: Tensor) -> tuple[Tensor, ...]:
        """Tokens and logarithms."""
        return self.tokens[where], self.logs[where]

    def distributions(self, own: Head, temperature: float, top_n: int | None) -> Callable[..., Distribution]:
        """Of as many tokens as are asked for; others that are kept belong to the rest."""

        def taught(_: int, tokens: Tensor, logs: Tensor) -> Distribution:
            tokens = tokens[:, :top_n]
            # What was rounded sums no longer to 1.
            logs = log_softmax(logs.float(), dim=1)
            by_themselves, others = logs[:, : tokens.shape[1]], logs[:, tokens.shape[1] :]
            logs = torch.cat([by_themselves, torch.logsumexp(others, dim=1, keepdim=True)], dim=1)
            numbers = tokens.long() & 0xFFFF if tokens.dtype == torch.int16 else tokens.long()
            return Distribution(logs, self.width, numbers)

        return taught


def _spread(parts: Sequence[Any], starts: Sequence[int], ids: Tensor) -> Tensor:
    """(B T, …) on the device of ids, with each example's rows from its start on; all others hold anything."""
    first = parts[0].view(np.int16) if parts[0].dtype == np.uint16 else parts[0]
    dtype = torch.from_numpy(np.empty(0, first.dtype)).dtype
    # From pageable memory a copy may wait for the device.
    rows = torch.empty((ids.numel(), first.shape[1]), dtype=dtype, pin_memory=ids.device.type == "cuda")
    into = rows.numpy()
    for start, part in zip(starts, parts, strict=False):
        into[start : start + len(part)] = part.view(first.dtype)
    return rows.to(ids.device, non_blocking=True)
