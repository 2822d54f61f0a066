"""What a cache asks of the past of one layer, whatever it holds.

Dimensions: B batch, H key-value heads, Hq query heads, D head_dim.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.buffer import Pair
from lrsa_lit.ops.sparse_attention.geometry import attended_pairs
from lrsa_lit.ops.sparse_attention.head_rules import HeadGroups


class Stream(ABC):
    """The cached past of a batch of equally long sequences, in one layer.

    Attributes:
        seen: tokens received so far.
        part_by_part: whether a prompt is processed in many small parts, so that each further row costs the host much.
        rows_cost_alike: whether all rows of the batch compute and read equally many pairs.
    """

    seen: int = 0
    part_by_part: ClassVar[bool] = False
    rows_cost_alike: ClassVar[bool] = True
    # The most bytes held within a call; set by streams that hold more during a call than after it.
    _peak: int = 0
    # The most additional bytes while :meth:`KeyValueStream.probe` attends, which one layer does at a time.
    _probing: int = 0

    @property
    @abstractmethod
    def stored(self) -> Pair | None:
        """The stored keys and values (B, H, stored, D); None before the first token, or if there are several parts."""

    @property
    def parts(self) -> Sequence[Stream]:
        """The streams that this one consists of: one per group of heads with equally many pairs, or only itself."""
        return (self,)

    @property
    def groups(self) -> HeadGroups | None:
        """The heads of each of the :attr:`parts`; None if this stream is the only part."""
        return None

    @property
    def stored_shape(self) -> torch.Size | None:
        """The shape of the :attr:`stored` keys."""
        return None if self.stored is None else self.stored[0].shape

    @property
    def nbytes(self) -> int:
        """Bytes stored of the past; memory that is reserved for later tokens does not count."""
        return 0 if self.stored is None else sum(part.numel() * part.element_size() for part in self.stored)

    @property
    def peak_nbytes(self) -> int:
        """The most bytes stored so far, also within calls, where the stream records it; otherwise those stored now."""
        return max(self._peak, self.nbytes)

    @property
    def probing_nbytes(self) -> int:
        """The most additional bytes of pairs that were attended to without being stored, by a probe or from latents."""
        return self._probing

    @property
    def attended_pairs(self) -> float:
        """Query-key pairs that a head has computed so far, mean over the heads; dense attention unless overridden."""
        return attended_pairs(self.seen, None)

    @property
    def read_share(self) -> float | None:
        """Mean share of a dense cache that an answer token has read; None if tokens read everything that is stored.

        Streams that look up which pairs to read override it. It is known after the answer.
        """
        return None

    def cost_of(self, row: int) -> tuple[float, float | None]:
        """:attr:`attended_pairs` and :attr:`read_share` of one row; override it if :attr:`rows_cost_alike` is false."""
        return self.attended_pairs, self.read_share

    @property
    def on_device(self) -> Tensor | None:
        """Numbers (M,) that other properties need and the host has not fetched yet; None if it has all."""
        return None

    def fetched(self, numbers: Sequence[float]) -> None:  # noqa: B027 - most streams have no such numbers
        """Take what :func:`fetch_numbers` has fetched of :attr:`on_device`."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store N new tokens and return the attention of their queries.

        Queries and output are (B, Hq, N, D). Keys, rotated at their true positions, and values are (B, H, N, D).
        """

    @classmethod
    def attend_rows(
        cls, streams: Sequence[Stream], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        """:meth:`attend` for one new token of each of several streams of one row, (B, heads, 1, D).

        None, and nothing is stored, if the rows must attend one by one: unless overridden.
        """
        return None

    def end_prompt(self) -> None:  # noqa: B027 - most streams need not do anything
        """Called when the prompt is complete; the next tokens are the answer's."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Stream:
        """A stream of the batch rows ``indices``, which may repeat (beam search, splitting a batch)."""


def fetch_numbers(streams: Sequence[Stream]) -> None:
    """Fetch the numbers that streams have on their devices; the host waits once for each device."""
    waiting: dict[torch.device, list[tuple[Stream, Tensor]]] = {}
    for stream in streams:
        if (numbers := stream.on_device) is not None:
            waiting.setdefault(numbers.device, []).append((stream, numbers))
    for some in waiting.values():
        values = iter(torch.cat([numbers for _, numbers in some]).tolist())
        for stream, numbers in some:
            stream.fetched(list(itertools.islice(values, len(numbers))))
