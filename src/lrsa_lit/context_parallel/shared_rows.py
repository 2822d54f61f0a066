"""Attention over rows that several ranks share, each a part of the tokens.

Each rank compresses the partitions whose references end in its shares, all gather the compact pairs, and what a query
sees raw is in its share or in the halo before it. So a rank moves K / L of what ring attention moves, and the halos.
A dense layer is one whose halo is the whole past.

Dimensions: B batch, H key-value heads, Hq query heads, Tr tokens that a rank holds, D head_dim, L lag_size, K top_k.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from lrsa_lit.context_parallel.exchange import Transfer, reached, with_halos
from lrsa_lit.context_parallel.one_share import OneShare
from lrsa_lit.context_parallel.share_plan import Gather, plan_of
from lrsa_lit.context_parallel.shares import Flags, Numbers, Shares
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import HeadRules, Impl, Rule, through_channels
from lrsa_lit.ops.sparse_attention.buffer import Pair
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL


@dataclass(frozen=True)
class SharedRows:
    """Rows of which each rank of a group holds two shares, and the attention over them.

    Args:
        shares: of each row; there are several only where none has more than one sequence.
        group: the ranks.
    """

    shares: Shares
    group: distributed.ProcessGroup

    def own(self, rows: Tensor) -> Tensor:
        """What this rank holds of something with a column for each token, (B, T) -> (B, Tr)."""
        return torch.cat([rows[:, start:stop] for start, stop in self.shares.spans(self.group.rank())], dim=1)

    def positions(self, device: torch.device) -> Tensor:
        """(1, Tr) the position of each token that this rank holds, in its sequence."""
        found = torch.from_numpy(self.shares.positions(self.group.rank()))[None]
        # From pageable memory a copy may wait for the device.
        return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)

    def held(self, places: Numbers) -> tuple[Flags, Numbers]:
        """Of places in the rows, which this rank holds and where; as :meth:`Shares.held` has it."""
        return self.shares.held(places, self.group.rank())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: Rule | HeadRules | None, *, scale: float,
        impl: Impl = "auto"
    ) -> Tensor:  # fmt: skip
        """What ``sparse_attention`` of the whole rows gives at this rank's tokens; all ranks call it.

        Args:
            query: (B, Hq, Tr, D), of the tokens of this rank's two shares.
            key: (B, H, Tr, D), rotated; with scores if the compressor takes some.
            value: (B, H, Tr, D).
            rule: the rule, or one of each head; None is dense attention.
            scale: factor of the scores before the softmax.
            impl: implementation of the operator.

        Returns:
            (B, Hq, Tr, D) in the query's dtype.
        """
        if isinstance(rule, HeadRules):
            return rule.attend(functools.partial(self._attend_group, scale=scale, impl=impl), query, key, value)
        return self._attend_group(query, key, value, KEEP_ALL if rule is None else rule, scale=scale, impl=impl)

    def _attend_group(
        self, query: Tensor, key: Tensor, value: Tensor, rule: Rule, *, scale: float, impl: Impl
    ) -> Tensor:
        attend = functools.partial(_attend, rule=rule, shared=self, impl=impl)
        if rule.compressor.has_bias:
            return through_channels(attend, query, key, value, scale)
        return attend(query, key, value, scale)


def needs_all_keys(system: object) -> UserError:
    """The complaint of what chooses from more than a partition and its reference."""
    reason = f"{type(system).__name__} chooses from the keys of all devices"
    return UserError("context", reason=f"{reason}; with shared rows each partition must be judged by one device")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, rule: Rule, shared: SharedRows, impl: Impl
) -> Tensor:
    plan, rank = plan_of(shared.shares, rule.numbers), shared.group.rank()
    sizes = [stop - start for start, stop in shared.shares.spans(rank)]
    halos = with_halos(torch.cat([key, value], dim=-1), plan, shared.group)
    parts = [
        OneShare(plan, share, queries, rows[..., : key.shape[-1]], rows[..., key.shape[-1] :], rule, impl)
        for share, queries, rows in zip(shared.shares.of_rank(rank), query.split(sizes, dim=2), halos, strict=True)
    ]
    # The gather of the shares from the front goes on while the others are compressed, that of the others while the
    # queries of those from the front attend.
    transfers = [Transfer(gather, shared.group) for gather in plan.gathers]
    begun = [
        transfer.begin(part.compressed()) if transfer.gather.rows else None
        for transfer, part in zip(transfers, parts, strict=True)
    ]
    outputs, gathered = [], _Gathered(value.new_empty(*value.shape[:2], 0, 2 * value.shape[3]))
    for transfer, part, rows in zip(transfers, parts, begun, strict=True):
        if rows is not None:
            gathered.add(transfer.gather, transfer.end(rows))
        outputs.append(part.attend(gathered.of, scale))
    return reached(torch.cat(outputs, dim=2), *gathered.rows)


class _Gathered:
    """The compact rows that are there, (B, H, rows, 2 D) of each gather."""

    def __init__(self, nothing: Tensor) -> None:
        self._gathers: list[Gather] = []
        self._nothing = nothing
        self.rows: list[Tensor] = []

    def add(self, gather: Gather, rows: Tensor) -> None:
        """Take in those of one more."""
        self._gathers.append(gather)
        self.rows.append(rows)

    def of(self, sequence: int) -> Pair:
        """Those of a sequence: keys and values (B, H, rows, D)."""
        spans = [gather.span(sequence) for gather in self._gathers]
        parts = [rows[:, :, start:stop] for rows, (start, stop) in zip(self.rows, spans, strict=True) if start < stop]
        whole = parts[0] if len(parts) == 1 else torch.cat([self._nothing, *parts], dim=2)
        key, value = whole.chunk(2, dim=-1)
        return key, value
