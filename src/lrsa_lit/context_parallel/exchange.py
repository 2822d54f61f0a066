"""The exchanges between ranks that share a row, with gradients: halos, and an asynchronous gather of compact rows.

All ranks of the group must call each function in the same order, in the forward and in the backward pass. Autograd runs
nodes that were created later first, so the order of the backward pass follows from that of the forward pass.

Dimensions: B batch, H key-value heads, N ranks, Tr tokens that a rank holds, W channels of a key and its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from lrsa_lit.context_parallel.share_plan import Gather, Plan, exchange_of

Group = distributed.ProcessGroup

all_to_all = distributed.all_to_all_single
# torch 2.13 renamed them.
all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def with_halos(pairs: Tensor, plan: Plan, group: Group) -> tuple[Tensor, Tensor]:
    """Exchange halos: from a rank's pairs (B, H, Tr, W), the halo and pairs (B, H, rows, W) of each of its shares."""
    first, second = _Halos.apply(pairs, plan, group)
    return first, second


class _Halos(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, plan: Plan, group: Group) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.plan, ctx.group = plan, group
        mine = exchange_of(plan, group.rank())
        sent = [pairs[:, :, part] for part in mine.sent]
        came = _all_to_all(sent, pairs, mine.outgoing, mine.incoming, group if plan.moves_any else None)
        found, start = [], 0
        for (begin, end), halo in zip(plan.shares.spans(group.rank()), mine.halos, strict=True):
            own = pairs[:, :, start : start + end - begin]
            found.append(torch.cat([*(came[:, :, part] for part in halo), own], dim=2))
            start += end - begin
        return found[0], found[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, group = ctx.plan, ctx.group
        mine = exchange_of(plan, group.rank())
        back: list[tuple[int, Tensor]] = []
        own = []
        for gradient, halo in zip(gradients, mine.halos, strict=True):
            start = 0
            for part in halo:
                size = part.stop - part.start
                back.append((part.start, gradient[:, :, start : start + size]))
                start += size
            own.append(gradient[:, :, start:])
        whole = torch.cat(own, dim=2)
        # Restore the order in which the pairs were received.
        parts = [part for _, part in sorted(back, key=lambda pair: pair[0])]
        returned = _all_to_all(parts, whole, mine.incoming, mine.outgoing, group if plan.moves_any else None)
        start = 0
        # Add in a fixed order: several ranks may return gradients of the same token, and the sum must be deterministic.
        for part in mine.sent:
            size = part.stop - part.start
            whole[:, :, part] += returned[:, :, start : start + size]
            start += size
        return whole, None, None


def _all_to_all(
    parts: Sequence[Tensor], like: Tensor, outgoing: list[int], incoming: list[int], group: Group | None
) -> Tensor:
    """Send parts (B, H, rows, W), ``outgoing`` rows to each rank; returns the received rows, concatenated.

    Without a group the rank only sends to itself.
    """
    packed = torch.cat([like[:, :, :0], *parts], dim=2).permute(2, 0, 1, 3).contiguous()
    if group is None:
        return packed.permute(1, 2, 0, 3)
    came = packed.new_empty(sum(incoming), *packed.shape[1:])
    all_to_all(came, packed, incoming, outgoing, group=group)
    return came.permute(1, 2, 0, 3)


@dataclass(eq=False)
class Transfer:
    """One asynchronous gather of compact rows; in the backward pass, the reduce-scatter of their gradients.

    Args:
        gather: how the rows are gathered.
        group: the ranks.
    """

    gather: Gather
    group: Group
    _under_way: list[Any] = field(default_factory=list, repr=False)
    _summed: Tensor | None = field(default=None, repr=False)

    def begin(self, rows: Tensor) -> Tensor:
        """Start gathering compact rows (B, H, up to ``gather.rows``, W). Only :meth:`end` may use the result."""
        begun: Tensor = _Begin.apply(rows, self)
        return begun

    def under_way(self, work: Any, sent: Tensor) -> None:
        """Store the work to wait for and the tensor that it reads."""
        self._under_way[:] = [work, sent]

    def wait(self) -> None:
        """Wait until the transfer is done. On a GPU, only kernels that are launched afterwards wait."""
        if self._under_way:
            self._under_way[0].wait()
            self._under_way.clear()

    def end(self, begun: Tensor) -> Tensor:
        """Wait, and return the compact rows (B, H, rows, W) in ``gather.order``."""
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
        work = all_gather(whole, sent, group=transfer.group, async_op=True)
        transfer.under_way(work, sent)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transfer: Transfer = ctx.transfer
        transfer.wait()
        summed, transfer._summed = transfer._summed, None
        assert summed is not None
        return summed[: ctx.rows].permute(1, 2, 0, 3), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, transfer: Transfer) -> Tensor:  # type: ignore[override]
        transfer.wait()
        ctx.transfer, ctx.shape = transfer, whole.shape
        return torch.cat([whole[start:stop] for start, stop in transfer.gather.order]).permute(1, 2, 0, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transfer: Transfer = ctx.transfer
        whole, place = gradient.new_zeros(ctx.shape), 0
        by_row = gradient.permute(2, 0, 1, 3)
        for start, stop in transfer.gather.order:
            whole[start:stop] = by_row[place : place + stop - start]
            place += stop - start
        summed = whole.new_empty(transfer.gather.rows, *whole.shape[1:])
        work = reduce_scatter(summed, whole, group=transfer.group, async_op=True)
        transfer.under_way(work, whole)
        transfer._summed = summed
        return whole, None


def reached(output: Tensor, *others: Tensor) -> Tensor:
    """The output, with an autograd dependency on ``others``: their backward pass must run on each rank, used or not."""
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
