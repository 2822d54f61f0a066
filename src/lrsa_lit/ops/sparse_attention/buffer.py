"""Rows of keys and values that grow at the end, in memory that is allocated now and then instead of at every token.

Dimensions: B batch, H key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Rows = TypeVar("Rows", bound=tuple[Tensor, ...])
"""Tensors (B, heads, rows, D) that grow together: keys and values, or queries alone."""

_SPARE = 32
"""A buffer that must grow takes 1/32 more than it needs: growing costs each row about 32 copies in all."""


def joined(*parts: Rows) -> Rows:
    """Rows (B, H, rows, D) behind each other."""
    return cast(Rows, tuple(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)))


def _each(change: Callable[[Tensor], Tensor], rows: Rows) -> Rows:
    return cast(Rows, tuple(change(part) for part in rows))


class RowBuffer(Generic[Rows]):
    """One or more tensors (B, heads, rows, D), copied, with spare rows behind the filled ones.

    Rows are written in place where gradients are off. Where they are on, whatever wants one, every change makes new
    tensors: autograd holds what a query has attended to.
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
        """All rows, (B, heads, capacity, D), the spare ones included: contiguous, whatever the length."""
        return self._parts

    @property
    def address(self) -> int:
        """Where the memory is: it moves when the buffer grows."""
        return self._parts[0].data_ptr()

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return self._parts[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the filled rows; room for later ones does not count."""
        return sum(part.nbytes for part in self.filled)

    def append(self, rows: Rows) -> None:
        """Put rows behind the filled ones."""
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
        """Make room for ``rows`` rows in all, and some more, if there is less or it may not be written to."""
        # Outside of inference mode torch refuses to write to what was made in it.
        if rows <= self.capacity and (torch.is_inference_mode_enabled() or not self._parts[0].is_inference()):
            return
        capacity = rows + rows // _SPARE
        self.move_to(_each(lambda part: part.new_empty(*part.shape[:2], capacity, part.shape[3]), self._parts))

    def move_to(self, memory: Rows) -> None:
        """Go on in other memory (B, heads, rows, D), with room for the filled rows.

        It may be a part of a larger one, which the buffer leaves for memory of its own when it outgrows its part.
        """
        for new, old in zip(memory, self.filled, strict=True):
            new[:, :, : self.length] = old
        self._parts = memory

    def rows(self, indices: Tensor) -> RowBuffer[Rows]:
        """A buffer of some rows of the batch, in the given order and multiplicity."""
        return RowBuffer(*_each(lambda part: part[indices], self.filled))


PairBuffer = RowBuffer[Pair]
"""Keys and values (B, H, rows, D)."""
