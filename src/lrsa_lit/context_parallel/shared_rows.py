"""Attention over rows that several ranks share: each rank holds a part of the tokens.

Each rank compresses the partitions whose references end in its shares. All ranks gather the compact pairs. The raw
pairs that a query sees are in its share or in the halo before it. So a rank receives the halos and K / L of the pairs
that it would receive in ring attention. The halo of a dense layer is the whole past.

Dimensions: B batch, H key-value heads, Hq query heads, Tr tokens that a rank holds, D head_dim, L lag_size, K top_k.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed

from lrsa_lit.context_parallel.exchange import Transfer, reached, with_halos
from lrsa_lit.context_parallel.one_share import OneShare
from lrsa_lit.context_parallel.share_plan import plan_of
from lrsa_lit.context_parallel.shares import Flags, Numbers, Shares
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import HeadRules, Impl, Rule, through_channels
from lrsa_lit.ops.sparse_attention.rule import KEEP_ALL

_GATHERS = 4
"""The most gathers per layer. No attention runs during the first one, and each one adds kernel launches."""


@dataclass(frozen=True)
class SharedRows:
    """Rows that a group of ranks shares (each rank holds two shares), and the attention over them.

    Args:
        shares: the shares of a row. If there are several rows, they all have one sequence and the same length.
        group: the ranks.
    """

    shares: Shares
    group: distributed.ProcessGroup

    def own(self, rows: Tensor) -> Tensor:
        """This rank's columns of a tensor with one column per token: (B, T, …) -> (B, Tr, …)."""
        return torch.cat([rows[:, start:stop] for start, stop in self.shares.spans(self.group.rank())], dim=1)

    def positions(self, device: torch.device) -> Tensor:
        """The position in its sequence of each token that this rank holds: (1, Tr)."""
        found = torch.from_numpy(self.shares.positions(self.group.rank()))[None]
        # Pinned, because a copy from pageable memory may wait for the device.
        return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)

    def held(self, places: Numbers) -> tuple[Flags, Numbers]:
        """:meth:`Shares.held` for this rank."""
        return self.shares.held(places, self.group.rank())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: Rule | HeadRules | None, *, scale: float,
        impl: Impl = "auto"
    ) -> Tensor:  # fmt: skip
        """The output of ``sparse_attention`` over the whole rows, for this rank's tokens. All ranks must call it.

        Args:
            query: (B, Hq, Tr, D), for the tokens of this rank's two shares.
            key: (B, H, Tr, D), rotated; with token scores if the compressor takes scores.
            value: (B, H, Tr, D).
            rule: the rule, or the rules of the heads; None means dense attention.
            scale: factor of the attention logits.
            impl: the implementation of the operator.

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
    """The error for a system that selects from more than a partition and its reference."""
    reason = f"{type(system).__name__} selects from the keys of all devices"
    return UserError("context", reason=f"{reason}; with shared rows, one device must score each partition")


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
    compressed = torch.cat([part.compressed() for part in parts], dim=2)
    # Some heads attend while the compact pairs of others are still being gathered.
    heads = _in_groups(key.shape[1]) if plan.gather.rows else []
    transfers = [Transfer(plan.gather, shared.group) for _ in heads]
    under_way = [transfer.begin(compressed[:, group]) for transfer, group in zip(transfers, heads, strict=True)]
    whole = [part.attend_whole(scale) for part in parts]
    gathered, of_groups = [], []
    for group, transfer, begun in zip(heads, transfers, under_way, strict=True):
        gathered.append(transfer.end(begun))
        of_groups.append([part.attend_parts(gathered[-1], group, scale) for part in parts])
    if not heads:
        of_groups.append([part.attend_parts(compressed, slice(0, key.shape[1]), scale) for part in parts])
    outputs = [
        part.joined(of_whole, [torch.cat(groups, dim=1) for groups in zip(*of_parts, strict=True)])
        for part, of_whole, of_parts in zip(parts, whole, zip(*of_groups, strict=True), strict=True)
    ]
    return reached(torch.cat(outputs, dim=2), *gathered)


def _in_groups(heads: int) -> list[slice]:
    """Groups of adjacent heads, at most ``_GATHERS``."""
    return [slice(group[0], group[-1] + 1) for group in np.array_split(range(heads), min(heads, _GATHERS))]
