"""Rows of keys and values that grow at the end, in memory that is allocated now and then instead of at every token.

Dimensions: B batch, H key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

_SPARE = 32
"""A buffer that must grow takes 1/32 more than it needs: growing costs each row about 32 copies in all."""


def joined(*pairs: Pair) -> Pair:
    """Rows of keys and values (B, H, rows, D) behind each other."""
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


class PairBuffer:
    """Keys and values (B, H, rows, D), copied, with spare rows behind the filled ones.

    Rows are written in place where gradients are off. Where they are on, whatever wants one, every change makes new
    tensors: autograd holds what a query has attended to.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.length = 0
        self._key, self._value = key[:, :, :0].clone(), value[:, :, :0].clone()
        self.append((key, value))

    @property
    def filled(self) -> Pair:
        """Keys and values (B, H, length, D)."""
        return self._key[:, :, : self.length], self._value[:, :, : self.length]

    @property
    def whole(self) -> Pair:
        """Keys and values (B, H, capacity, D), the spare rows included: contiguous, whatever the length."""
        return self._key, self._value

    @property
    def address(self) -> int:
        """Where the memory is: it moves when the buffer grows."""
        return self._key.data_ptr()

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return self._key.shape[2]

    def append(self, rows: Pair) -> None:
        """Put rows behind the filled ones."""
        key, value = rows
        stop = self.length + key.shape[2]
        if torch.is_grad_enabled():
            self._key, self._value = joined(self.filled, rows)
        else:
            self.reserve(stop)
            self._key[:, :, self.length : stop] = key
            self._value[:, :, self.length : stop] = value
        self.length = stop

    def cut(self, length: int) -> Pair:
        """Keep the first ``length`` rows; returns copies of the others."""
        key, value = self.filled
        rest = key[:, :, length:].clone(), value[:, :, length:].clone()
        self.length = length
        return rest

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in all, and some more, if there is less or it may not be written to."""
        # Outside of inference mode torch refuses to write to what was made in it.
        if rows <= self.capacity and (torch.is_inference_mode_enabled() or not self._key.is_inference()):
            return
        filled = self.filled
        shape = (*self._key.shape[:2], rows + rows // _SPARE, self._key.shape[3])
        self._key, self._value = (part.new_empty(shape) for part in filled)
        self._key[:, :, : self.length], self._value[:, :, : self.length] = filled

    def move_to(self, memory: Pair) -> None:
        """Go on in other memory: keys and values (B, H, rows, D), with room for the filled rows.

        It may be a part of a larger one, which the buffer leaves for memory of its own when it outgrows its part.
        """
        for new, old in zip(memory, self.filled, strict=True):
            new[:, :, : self.length] = old
        self._key, self._value = memory

    def rows(self, indices: Tensor) -> PairBuffer:
        """A buffer of some rows of the batch, in the given order and multiplicity."""
        key, value = self.filled
        return PairBuffer(key[indices], value[indices])
