"""The operator chunk by chunk: keys and values that come in over several calls, compressed where the rule says.

Dimensions: B batch, H key-value heads, Hq query heads, D head_dim, S sink_size, L lag_size, K top_k, P partitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrsa_lit.ops.sparse_attention.config import LRSAConfig
from lrsa_lit.ops.sparse_attention.geometry import compact_size, compressed_at, raw_start
from lrsa_lit.ops.sparse_attention.impl import reference
from lrsa_lit.ops.sparse_attention.selection import compress, partitions_of

Pair = tuple[Tensor, Tensor]


class KeyValueStream:
    """What a batch of equally long sequences still needs of its past: sinks, kept pairs and the raw window.

    Any split of the tokens over calls gives the outputs of the parallel pass, because partitions are compressed where
    the rule's chunks start and not where calls end. After a call the store holds S + K P + raw tokens per head,
    ``geometry.stored_size`` of the tokens seen.

    Args:
        config: the rule; None keeps everything (a dense layer).
    """

    def __init__(self, config: LRSAConfig | None) -> None:
        self.config = config
        self.seen = 0
        self._compact: Pair | None = None
        self._raw: Pair | None = None

    @property
    def stored(self) -> Pair | None:
        """Keys and values (B, H, stored, D), compact ones first; None before the first token."""
        if self._raw is None or self._compact is None:
            return None
        return _join(self._compact, self._raw)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Take in N new tokens and attend from them.

        Args:
            query: (B, Hq, N, D).
            key: (B, H, N, D), rotated at their true positions.
            value: (B, H, N, D).
            scale: factor of the scores.

        Returns:
            (B, Hq, N, D).
        """
        start, self.seen = self.seen, self.seen + key.shape[2]
        # New tensors, not views of length 0: a view would keep the first call's tokens in memory.
        empty = key[:, :, :0].clone(), value[:, :, :0].clone()
        raw = _join(self._raw or empty, (key, value))
        compact = self._compact or empty
        if self.config is None:
            self._compact, self._raw = compact, raw
            grouped = query.unflatten(1, (key.shape[1], -1))
            return reference.causal_attention(grouped, *raw, scale).flatten(1, 2)
        before, now = compressed_at(start - 1, self.config), compressed_at(self.seen - 1, self.config)
        offset = raw_start(before, self.config)
        if now > before:
            compact = self._compressed(compact, raw, before, now)
        output = reference.attend(query, compact, raw, self.config, scale=scale, query_offset=start, raw_offset=offset)
        # A copy, not a view: a view would keep the dropped tokens in memory.
        drop = raw_start(now, self.config) - offset
        self._compact = compact
        self._raw = raw if drop == 0 else (raw[0][:, :, drop:].clone(), raw[1][:, :, drop:].clone())
        return output

    def _compressed(self, compact: Pair, raw: Pair, before: int, now: int) -> Pair:
        """The compact buffer with partitions ``before`` … ``now`` - 1 added, the sinks in front."""
        assert self.config is not None
        key, value = raw
        if before == 0:
            sink = self.config.sink_size
            compact = key[:, :, :sink], value[:, :, :sink]
            key, value = key[:, :, sink:], value[:, :, sink:]
        assert compact[0].shape[2] == max(compact_size(before, self.config), self.config.sink_size)
        return _join(compact, compress(partitions_of(key, value, self.config, now - before, before), self.config))

    def rows(self, indices: Tensor) -> KeyValueStream:
        """A stream of some of the rows, in the given order and multiplicity (beam search, splitting a batch)."""
        other = KeyValueStream(self.config)
        other.seen = self.seen
        if self._compact is not None and self._raw is not None:
            other._compact = self._compact[0][indices], self._compact[1][indices]
            other._raw = self._raw[0][indices], self._raw[1][indices]
        return other


def _join(first: Pair, second: Pair) -> Pair:
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)
