"""The layout of a forward call's rows: padding, packing and positions, computed once for all layers.

Dimensions: B rows, T tokens per row in this call, N sequences, R real tokens in all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsa_lit.context_parallel import SharedRows
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import checked_boundaries

PackedAttention = Callable[..., Tensor]
"""query, key, value and the keyword cu_seqlens -> output, all (B, heads, T, D)."""


@dataclass(frozen=True)
class Layout:
    """The sequences of a call.

    Attributes:
        real: (R,) int64, indices of the real tokens in the flattened (B T) rows; None if all are real and either no
            sequence starts inside a row or there is only one row.
        cu_seqlens: (N + 1,) int32 on the CPU, boundaries of the sequences among the real tokens; None if each row is
            one sequence.
        row_spans: for each row the columns [start, stop) of its real keys, counted from the first column of the mask;
            None if all are real.
        shared: the rows, if several devices share them; the other attributes are then None.
    """

    real: Tensor | None = None
    cu_seqlens: Tensor | None = None
    row_spans: tuple[tuple[int, int], ...] | None = None
    shared: SharedRows | None = None

    def apply(self, attend: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run ``attend`` so that sequences do not see each other; outputs of pads are 0.

        Queries and output are (B, Hq, T, D). Keys and values are (B, H, T or more, D): they have more tokens if an
        uncompressed cache holds the past.
        """
        if query.shape[2] != key.shape[2] and self.row_spans is not None:
            return self._row_by_row(attend, query, key, value)
        if self.real is None:
            return attend(query, key, value, cu_seqlens=self.cu_seqlens)
        output = torch.zeros_like(query).transpose(1, 2).contiguous()
        if len(self.real):
            real = (tensor.transpose(1, 2).flatten(0, 1)[self.real] for tensor in (query, key, value))
            packed = attend(*(tokens.transpose(0, 1).unsqueeze(0) for tokens in real), cu_seqlens=self.cu_seqlens)
            attended = packed.squeeze(0).transpose(0, 1)
            output = output.flatten(0, 1).index_copy(0, self.real, attended).view_as(output)
        return output.transpose(1, 2)

    def _row_by_row(self, attend: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the last T columns, row by row, each with the real keys of its row."""
        assert self.row_spans is not None
        output = torch.zeros_like(query)
        past = key.shape[2] - query.shape[2]
        for row, (start, stop) in enumerate(self.row_spans):
            columns = slice(max(start - past, 0), stop - past)
            one = slice(row, row + 1)
            if columns.start < columns.stop:
                keys, values = key[one, :, start:stop], value[one, :, start:stop]
                output[one, :, columns] = attend(query[one, :, columns], keys, values, cu_seqlens=None)
        return output


def packed_layout(boundaries: Sequence[int]) -> Layout:
    """The layout of one row of packed sequences without padding, with ``boundaries`` 0 … T.

    Pass it to the model as ``lrsa_layout`` together with positions that restart. Then no forward has to read the
    positions back from the GPU.
    """
    return Layout(cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device="cpu"))


def read_layout(mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], past: int) -> Layout:
    """The layout of a call, from the arguments of a Hugging Face model.

    Args:
        mask: (B, past + T), 1 for real tokens; None if all are real.
        positions: (B or 1, T) position ids. A real token starts a sequence if its position is not that of the token
            before it plus one. None: positions are consecutive.
        shape: (B, T).
        past: the number of earlier columns whose keys the attention receives again.

    Raises:
        UserError: the mask has another shape, other values or holes; or packed sequences continue a cache.
    """
    batch, length = shape
    if positions is not None and tuple(positions.shape) not in ((1, length), (batch, length)):
        raise UserError("position_ids", tuple(positions.shape), f"({batch}, {length})")
    mask = None if mask is None else checked_mask(mask, (batch, past + length))
    spans = None if mask is None else _row_spans(mask)
    if positions is not None:
        positions = positions.expand(batch, length)
    starts = _sequence_starts(mask, positions, shape, past)
    rows = batch if mask is None else int(mask[:, past:].any(dim=-1).sum())
    if past and len(starts) > rows:
        raise UserError("position_ids", reason="restart inside a row, but packed sequences cannot continue a cache")
    if spans is None and len(starts) <= batch:
        return Layout()
    if spans is None and batch == 1:
        return packed_layout([*starts, length])
    real = torch.arange(batch * length, device="cpu") if mask is None else mask[:, past:].flatten().nonzero()[:, 0]
    order = torch.searchsorted(real.cpu(), torch.tensor(starts, dtype=torch.int64, device="cpu"))
    cu_seqlens = torch.nn.functional.pad(order, (0, 1), value=len(real)).to(torch.int32)
    device = mask.device if mask is not None else (positions.device if positions is not None else "cpu")
    return Layout(real.to(device), cu_seqlens, spans)


def positions_from_mask(mask: Tensor, length: int) -> Tensor:
    """(B, T) positions that count from the first real token of each row. Left pads get 0, right pads the last one."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def restarting_positions(boundaries: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """(1, T) positions that restart at each boundary. A UserError is raised if given ``positions`` differ from them."""
    values = checked_boundaries(boundaries.tolist(), length, "cu_seq_lens_q")
    parts = [torch.arange(stop - start, device="cpu") for start, stop in itertools.pairwise(values)]
    restarting = torch.cat(parts)[None]
    if positions is not None and not (positions.shape[-1] == length and bool((positions.cpu() == restarting).all())):
        raise UserError("cu_seq_lens_q", reason=f"position_ids must count from 0 in each of its sequences {values}")
    return restarting


def checked_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """A mask of 0 and 1 as bool; None if nothing is masked.

    Raises:
        UserError: the mask has another shape, or another kind: one per layer type, additive, or with sequence numbers.
    """
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError("attention_mask", given, f"a tensor {shape}")
    real = mask == 1
    if bool(real.all()):
        return None
    others = mask[~(real | (mask == 0))]
    # Floating-point zeros are an additive mask that hides nothing; they would be mistaken for pads only.
    if len(others) or (mask.is_floating_point() and not bool(real.any())):
        value = others[0].item() if len(others) else 0.0
        hint = "pack sequences by position_ids that restart or by cu_seq_lens_q"
        raise UserError("attention_mask", value, "1 for real tokens and 0 for pads", hint=hint)
    return real


def _row_spans(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """Columns [start, stop) of the real tokens of each row; (0, 0) for a row without any."""
    columns = mask.shape[1]
    count = mask.sum(dim=-1)
    start = torch.where(count > 0, mask.int().argmax(dim=-1), 0)
    stop = torch.where(count > 0, columns - mask.flip(-1).int().argmax(dim=-1), 0)
    holes = (stop - start != count).tolist()
    if any(holes):
        raise UserError("attention_mask", reason=f"has a hole in row {holes.index(True)}; pad left or right only")
    return tuple(zip(start.tolist(), stop.tolist(), strict=True))


def _sequence_starts(mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], past: int) -> list[int]:
    """Indices in the flattened (B T) rows where a sequence, or its part in this call, begins."""
    batch, length = shape
    if mask is None and positions is None:
        return [row * length for row in range(batch)]
    device = mask.device if mask is not None else positions.device  # type: ignore[union-attr]
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask[:, past:]
    first = real.clone()
    if positions is None:
        first[:, 1:] &= ~real[:, :-1]
    else:
        first[:, 1:] &= ~real[:, :-1] | (positions[:, 1:] != positions[:, :-1] + 1).to(device)
    places: list[int] = first.flatten().nonzero()[:, 0].tolist()
    return places
