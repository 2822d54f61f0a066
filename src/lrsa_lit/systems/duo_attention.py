"""DuoAttention: retrieval heads keep everything, the others only sinks and recent tokens.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import (
    GroupedStream,
    HeadGroups,
    Impl,
    KeyValueStream,
    Stream,
    attended_pairs,
    dense_attention,
)
from lrsa_lit.systems.ranking import CacheShare, is_table, read_ranking
from lrsa_lit.systems.streaming import StreamingHeads, streaming_attention, streaming_pairs
from lrsa_lit.systems.system import Head, Place, System, sequences


@dataclass(frozen=True)
class DuoAttention(System):
    """DuoAttention (arXiv 2410.10819) with given gates: trained ones, or a ranking of heads.

    The heads with the highest gates are full: they see and hold everything. The others see and hold only sinks and
    recent tokens, at their original positions. The sparsity sets the share of full heads in the whole model: a head is
    full if its gate is at least that quantile of all gates. Of equal gates, those of earlier layers and heads count as
    higher; the paper's code breaks ties at random.

    Args:
        gates: a list per layer (including dense layers) with a gate per KV head, or the path of a file: a JSON list of
            lists, a line of numbers per layer separated by tabs or spaces (the paper's ``full_attention_heads.tsv``),
            or the ``heads.json`` of an ablation. Gates are clipped to [0, 1].
        sparsity: share of heads that are not full (0 to 1; the paper uses 0.5 for GQA and 0.75 for MHA), or
            ``{budget: 0.25, tokens: 4096}``: as many full heads as fit into this share of a dense cache at this length.
        sink_size: number of first tokens that the other heads see (>= 0).
        recent: number of last tokens that the other heads see, including the query's own (>= 1).

    Raises:
        UserError: a file cannot be read, gates are not a table of numbers, a size is out of bounds, or a budget is
            below the pairs that all heads always hold. When enabled on a model: the gates are for another shape.
    """

    gates: Any
    sparsity: float | dict[str, Any] = 0.5
    sink_size: int = 64
    recent: int = 256
    trains: ClassVar[bool] = True
    budget_field: ClassVar[str] = "sparsity"

    def __post_init__(self) -> None:
        """Read the gates, then check each bound once."""
        gates = read_ranking("gates", self.gates) if isinstance(self.gates, str) else self.gates
        object.__setattr__(self, "gates", _checked(gates))
        for name, least in (("sink_size", 0), ("recent", 1)):
            value = getattr(self, name)
            check_setting(name, value, is_integer(value) and value >= least, f"an integer >= {least}")
        if isinstance(self.sparsity, Mapping):
            object.__setattr__(self, "sparsity", self._sparsity(CacheShare.of("sparsity", self.sparsity)))
        check_setting("sparsity", self.sparsity, is_weight(self.sparsity) and self.sparsity <= 1, "from 0 to 1")

    def _sparsity(self, share: CacheShare) -> float:
        """The smallest sparsity with which heads hold at most this share on average."""
        none = dataclasses.replace(self, sparsity=1.0)
        one = Head(1, 1, 1)
        found = none.at_most(float(share.pairs) * one.pair + 1e-6, share.tokens, one)
        if found is None:
            lowest = math.ceil(1e4 * none.held(share.tokens) / share.tokens - 1e-6) / 1e4
            least = f"at least {lowest:.4f} at {share.tokens} tokens, because all heads hold sinks and recent tokens"
            raise UserError("sparsity.budget", share.budget, least)
        assert isinstance(found, DuoAttention)
        assert not isinstance(found.sparsity, dict)
        return found.sparsity

    @functools.cached_property
    def full(self) -> tuple[tuple[bool, ...], ...]:
        """Whether each head of each layer is full."""
        places = [(layer, head) for layer, row in enumerate(self.gates) for head in range(len(row))]
        assert not isinstance(self.sparsity, dict)
        # If a quantile falls between two gates, the higher gate is the first that reaches it.
        below = len(places) if self.sparsity == 1 else math.ceil(self.sparsity * (len(places) - 1) - 1e-9)
        order = sorted(places, key=lambda place: -self.gates[place[0]][place[1]])
        kept = set(order[: len(places) - below])
        return tuple(tuple((layer, head) in kept for head in range(len(row))) for layer, row in enumerate(self.gates))

    def floor(self, tokens: int) -> int:
        """0: no head is full."""
        return 0

    def most(self, tokens: int) -> int:
        """The number of heads: all are full."""
        return sum(map(len, self.gates))

    def sized(self, size: int) -> DuoAttention:
        """The same with ``size`` full heads."""
        heads = self.most(0)
        # A quantile between the highest gate that is not full and the lowest that is.
        below = max(heads - size - 0.5, 0.0) / max(heads - 1, 1)
        return dataclasses.replace(self, sparsity=below if size else 1.0)

    def held(self, tokens: int) -> float:
        """The mean over all heads."""
        full = sum(map(sum, self.full)) / self.most(0)
        return full * tokens + (1 - full) * min(tokens, self.sink_size + self.recent)

    def of_layers(self, count: int) -> DuoAttention:
        """The same for ``count`` layers, with the gates of evenly spaced layers and the same share of full heads."""
        gates = tuple(self.gates[index * len(self.gates) // count] for index in range(count))
        return dataclasses.replace(self, gates=gates)

    def check(self, layers: int, heads: int) -> None:
        """See :class:`System`."""
        given = len(self.gates), len(self.gates[0])
        if given != (layers, heads):
            reason = "has gates of {} layers x {} heads; the model has {} x {}".format(*given, layers, heads)
            raise UserError("gates", reason=reason)

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`; one stream for the full heads and one for the others."""
        groups, kinds = self._groups(place.layer)
        made = {True: lambda: KeyValueStream(None, impl), False: lambda: StreamingHeads(self.sink_size, self.recent)}
        parts = [made[full]() for full in kinds]
        return parts[0] if len(parts) == 1 else GroupedStream(groups, parts)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, scale: float, place: Place
    ) -> Tensor:
        """See :class:`System`. If there are fewer queries than keys, they are the last ones."""
        groups, kinds = self._groups(place.layer)
        outputs = []
        for full, q, k, v in zip(kinds, *map(groups.split, (query, key, value)), strict=True):
            if full:
                outputs.append(dense_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale))
                continue
            parts = sequences(q, k, v, cu_seqlens)
            each = [streaming_attention(*part, self.sink_size, self.recent, scale) for part in parts]
            outputs.append(torch.cat(each, dim=2))
        return groups.join(outputs)

    def attended_pairs(self, length: int) -> int:
        """See :class:`System`; the mean over all heads, rounded down."""
        full = sum(map(sum, self.full))
        streaming = len(self.gates) * len(self.gates[0]) - full
        of_streaming = streaming_pairs(length, self.sink_size, self.recent)
        return (full * attended_pairs(length, None) + streaming * of_streaming) // (full + streaming)

    def _groups(self, layer: int) -> tuple[HeadGroups, list[bool]]:
        """The full heads of a layer and the others, and whether each group is full; empty groups are left out."""
        row = self.full[layer]
        kinds = [full for full in (True, False) if full in row]
        return HeadGroups(tuple(tuple(h for h, own in enumerate(row) if own == full) for full in kinds)), kinds


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, *, sink: int, recent: int, scale: float
) -> Tensor:
    """The attention for training DuoAttention's gates: gate x full + (1 - gate) x streaming attention, per head.

    Args:
        query: (B, Hq, N, D), the last N of T tokens.
        key: (B, H, T, D).
        value: (B, H, T, D).
        gates: (H,), clipped to [0, 1]; differentiable, as all inputs are.
        sink: number of first tokens that streaming attention sees.
        recent: number of last tokens that it sees, including the query's own.
        scale: factor of the attention logits.

    Returns:
        (B, Hq, N, D) in the query's dtype.
    """
    full = dense_attention(query, key, value, scale=scale)
    streaming = streaming_attention(query, key, value, sink, recent, scale)
    shares = gates.clamp(0, 1).repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]
    return (shares * full + (1 - shares) * streaming).to(query.dtype)


def _checked(gates: Any) -> tuple[tuple[float, ...], ...]:
    """Gates as a table, clipped; a UserError if they are not a table of numbers."""
    allowed = "a list per layer, each with one finite number per KV head, or the path of a file"
    check_setting("gates", gates, is_table(gates), allowed)
    return tuple(tuple(float(min(max(gate, 0), 1)) for gate in row) for row in gates)
