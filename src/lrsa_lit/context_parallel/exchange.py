"""What ranks exchange for a row that they share, with its gradient: halos, and compact rows while something else runs.

Each function is collective: all ranks of the group call it, in one order, in the forward and in the backward pass. The
order of the backward pass follows from that of the forward pass, as autograd runs later nodes first.

Dimensions: B batch, H key-value heads, N ranks, Tr tokens that a rank holds, W channels of a key and its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from lrsa_lit.context_parallel.share_plan import Gather, Plan

Group = distributed.ProcessGroup


def with_halos(pairs: Tensor, plan: Plan, group: Group) -> tuple[Tensor, Tensor]:
    """The pairs (B, H, rows, W) of each of a rank's shares, behind those of its halo; from pairs (B, H, Tr, W)."""
    first, second = _Halos.apply(pairs, plan, group)
    return first, second


class _Halos(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, plan: Plan, group: Group) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.plan, ctx.group = plan, group
        sent = [pairs[:, :, part] for part in _sent(plan, group.rank())]
        came = _all_to_all(sent, pairs, plan, group, backwards=False)
        found, start = [], 0
        for share, halo in zip(plan.shares.of_rank(group.rank()), _came(plan, group.rank()), strict=True):
            size = plan.shares.cuts[share + 1] - plan.shares.cuts[share]
            found.append(torch.cat([*(came[:, :, part] for part in halo), pairs[:, :, start : start + size]], dim=2))
            start += size
        return found[0], found[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, group = ctx.plan, ctx.group
        rank = group.rank()
        back: list[tuple[int, Tensor]] = []
        own = []
        for gradient, halo in zip(gradients, _came(plan, rank), strict=True):
            start = 0
            for part in halo:
                size = part.stop - part.start
                back.append((part.start, gradient[:, :, start : start + size]))
                start += size
            own.append(gradient[:, :, start:])
        whole = torch.cat(own, dim=2)
        # In the order in which they came.
        parts = [part for _, part in sorted(back, key=lambda pair: pair[0])]
        returned = _all_to_all(parts, whole, plan, group, backwards=True)
        start = 0
        for part in _sent(plan, rank):
            size = part.stop - part.start
            whole[:, :, part] += returned[:, :, start : start + size]
            start += size
        return whole, None, None


def _sent(plan: Plan, rank: int) -> list[slice]:
    """Which of its own tokens a rank sends, in the order of the moves."""
    before, found = 0, {}
    for share in plan.shares.of_rank(rank):
        found[share] = before - plan.shares.cuts[share]
        before += plan.shares.cuts[share + 1] - plan.shares.cuts[share]
    return [
        slice(move.start + offset, move.stop + offset)
        for move in plan.moves
        if move.sender == rank
        for share, offset in found.items()
        if plan.shares.cuts[share] <= move.start < plan.shares.cuts[share + 1]
    ]


def _came(plan: Plan, rank: int) -> list[list[slice]]:
    """For each share of a rank where, in what came, the parts of its halo are, from the first token on."""
    halos: dict[int, list[tuple[int, slice]]] = {share: [] for share in plan.shares.of_rank(rank)}
    before = 0
    for move in plan.moves:
        if move.receiver == rank:
            size = move.stop - move.start
            halos[move.share].append((move.start, slice(before, before + size)))
            before += size
    return [[part for _, part in sorted(parts, key=lambda pair: pair[0])] for parts in halos.values()]


def _all_to_all(parts: Sequence[Tensor], like: Tensor, plan: Plan, group: Group, *, backwards: bool) -> Tensor:
    """Send parts (B, H, rows, W) as the moves say, or as they came; returns all that comes, one behind the other."""
    rank, ranks = group.rank(), range(group.size())
    outgoing, incoming = (
        [sum(move.stop - move.start for move in plan.moves if ends(move) == (rank, other)) for other in ranks]
        for ends in (lambda move: (move.sender, move.receiver), lambda move: (move.receiver, move.sender))
    )
    if backwards:
        outgoing, incoming = incoming, outgoing
    nothing = like[:, :, :0]
    packed = torch.cat([nothing, *parts], dim=2).permute(2, 0, 1, 3).contiguous()
    came = packed.new_empty(sum(incoming), *packed.shape[1:])
    if plan.moves_any:
        distributed.all_to_all_single(came, packed, incoming, outgoing, group=group)
    else:
        came.copy_(packed)
    return came.permute(1, 2, 0, 3)


@dataclass(eq=False)
class Transfer:
    """A gather under way, and in the backward pass the sum of the gradients of what was gathered.

    Args:
        gather: what.
        group: who.
    """

    gather: Gather
    group: Group
    _wait: Callable[[], Any] = field(default=lambda: None, repr=False)
    _summed: Tensor | None = field(default=None, repr=False)

    def begin(self, rows: Tensor) -> Tensor:
        """Send compact rows (B, H, up to ``gather.rows``, W) to all; what it returns is for :meth:`end` alone."""
        begun: Tensor = _Begin.apply(rows, self)
        return begun

    def end(self, begun: Tensor) -> Tensor:
        """Wait; returns the compact rows (B, H, rows, W) in ``gather.order()``."""
        found: Tensor = _End.apply(begun, self)
        return found


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:  # type: ignore[override]
        ctx.transfer, ctx.rows = transfer, rows.shape[2]
        batch, heads, count, width = rows.shape
        sent = rows.new_zeros(transfer.gather.rows, batch, heads, width)
        sent[:count] = rows.permute(2, 0, 1, 3)
        whole = sent.new_empty(transfer.group.size() * len(sent), *sent.shape[1:])
        work = distributed.all_gather_into_tensor(whole, sent, group=transfer.group, async_op=True)
        transfer._wait = _holding(work, sent)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transfer: Transfer = ctx.transfer
        transfer._wait()
        summed, transfer._summed = transfer._summed, None
        assert summed is not None
        return summed[: ctx.rows].permute(1, 2, 0, 3), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, transfer: Transfer) -> Tensor:  # type: ignore[override]
        transfer._wait()
        ctx.transfer, ctx.shape = transfer, whole.shape
        return torch.cat([whole[start:stop] for start, stop in transfer.gather.order()]).permute(1, 2, 0, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transfer: Transfer = ctx.transfer
        whole, place = gradient.new_zeros(ctx.shape), 0
        by_row = gradient.permute(2, 0, 1, 3)
        for start, stop in transfer.gather.order():
            whole[start:stop] = by_row[place : place + stop - start]
            place += stop - start
        summed = whole.new_empty(transfer.gather.rows, *whole.shape[1:])
        work = distributed.reduce_scatter_tensor(summed, whole, group=transfer.group, async_op=True)
        transfer._wait, transfer._summed = _holding(work, whole), summed
        return whole, None


def _holding(work: Any, sent: Tensor) -> Callable[[], Any]:
    """Waits for a transfer, until when its memory must live."""
    return lambda: (work.wait(), sent)


def reached(output: Tensor, *others: Tensor) -> Tensor:
    """The output, with a gradient of zero to the others: their ranks wait for this one in the backward pass."""
    found: Tensor = _Reached.apply(output, *others)
    return found


class _Reached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        ctx.others = len(others)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.others
