"""Growing buffers of keys and values, which allocate memory now and then instead of at every token.

Dimensions: B batch, H key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Rows = TypeVar("Rows", bound=tuple[Tensor, ...])
"""Tensors (B, heads, rows, D) that grow together: keys and values, or queries alone."""

_SPARE = 32
"""A buffer that must grow takes 1/32 more than it needs, so that growing copies each row about 32 times in all."""


class Seen(NamedTuple):
    """What the new tokens of a row see.

    Attributes:
        compact: sinks, then kept pairs: keys and values (B, H, >= S + K P, D).
        raw: keys and values (B, H, Tr, D) from position ``raw_from`` on; the last ones are the new tokens'.
        new_from: the position of the first new token.
        raw_from: the position of the first raw pair.
    """

    compact: Pair
    raw: Pair
    new_from: int
    raw_from: int

    @property
    def tokens(self) -> int:
        """All tokens of the row, with the new ones."""
        return self.raw_from + self.raw[0].shape[2]


def joined(*parts: Rows) -> Rows:
    """Concatenate rows (B, H, rows, D)."""
    return cast(Rows, tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))


def _each(change: Callable[[Tensor], Tensor], rows: Rows) -> Rows:
    return cast(Rows, tuple(change(part) for part in rows))


class RowBuffer(Generic[Rows]):
    """One or more tensors (B, heads, rows, D) with spare rows after the filled ones; the given rows are copied.

    Without gradients, rows are written in place. With gradients enabled, every append makes new tensors, because
    autograd keeps the tensors that a query has attended to.
    """

    def __init__(self, *rows: Tensor) -> None:
        self.length = 0
        self._parts = _each(lambda part: part[:, :, :0].clone(), cast(Rows, rows))
        self.append(cast(Rows, rows))

    @property
    def filled(self) -> Rows:
        """The filled rows, (B, heads, length, D)."""
        return _each(lambda part: part[:, :, : self.length], self._parts)

    @property
    def whole(self) -> Rows:
        """All rows, (B, heads, capacity, D), spare ones included; unlike :attr:`filled`, always contiguous."""
        return self._parts

    @property
    def address(self) -> int:
        """The memory address, which changes when the buffer grows."""
        return self._parts[0].data_ptr()

    @property
    def capacity(self) -> int:
        """The number of rows that fit into the memory."""
        return self._parts[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the filled rows; spare rows do not count."""
        # Without a view of each part, because a cache asks for the bytes of thousands of buffers.
        return sum(part.nbytes // max(self.capacity, 1) * self.length for part in self._parts)

    def append(self, rows: Rows) -> None:
        """Append rows to the filled ones."""
        stop = self.length + rows[0].shape[2]
        if torch.is_grad_enabled():
            self._parts = joined(self.filled, rows)
        else:
            self.reserve(stop)
            for part, new in zip(self._parts, rows, strict=True):
                part[:, :, self.length : stop] = new
        self.length = stop

    def cut(self, length: int) -> Rows:
        """Keep the first ``length`` rows; returns copies of the others."""
        rest = _each(lambda part: part[:, :, length:].clone(), self.filled)
        self.length = length
        return rest

    def reserve(self, rows: int) -> None:
        """Allocate memory for ``rows`` rows in all and a few more, if there is less or it cannot be written to."""
        # Outside inference mode, torch refuses to write to tensors that were made in it.
        if rows <= self.capacity and (torch.is_inference_mode_enabled() or not self._parts[0].is_inference()):
            return
        capacity = rows + rows // _SPARE
        self.move_to(_each(lambda part: part.new_empty(*part.shape[:2], capacity, part.shape[3]), self._parts))

    def move_to(self, memory: Rows) -> None:
        """Copy the filled rows to other memory (B, heads, rows, D) and continue there.

        The memory may be part of a larger tensor. If the buffer outgrows it, it allocates its own.
        """
        for new, old in zip(memory, self.filled, strict=True):
            new[:, :, : self.length] = old
        self._parts = memory

    def rows(self, indices: Tensor) -> RowBuffer[Rows]:
        """A buffer of the batch rows ``indices``, which may repeat."""
        return RowBuffer(*_each(lambda part: part[indices], self.filled))


PairBuffer = RowBuffer[Pair]
"""Keys and values (B, H, rows, D)."""
