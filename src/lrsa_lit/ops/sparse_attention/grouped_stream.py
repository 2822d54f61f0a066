"""The past of a layer whose heads hold different numbers of pairs: one stream per group of heads.

Dimensions: B batch, H key-value heads, Hq query heads, N new tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lrsa_lit.ops.sparse_attention.abstract_stream import Stream
from lrsa_lit.ops.sparse_attention.api import Impl
from lrsa_lit.ops.sparse_attention.head_rules import HeadGroups, HeadRules
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream


class GroupedStream(Stream):
    """One stream per group of heads; all of them receive the same tokens.

    Args:
        groups: the heads of each stream.
        parts: the streams.
    """

    def __init__(self, groups: HeadGroups, parts: Sequence[Stream]) -> None:
        self._groups = groups
        self._parts = parts
        self.seen = parts[0].seen

    @classmethod
    def of(cls, rules: HeadRules, impl: Impl) -> GroupedStream:
        """An empty stream for heads with different rules."""
        return cls(rules.groups, [KeyValueStream(rule, impl) for rule in rules.rules])

    @property
    def groups(self) -> HeadGroups:
        """See :class:`Stream`."""
        return self._groups

    @property
    def parts(self) -> Sequence[Stream]:
        """See :class:`Stream`."""
        return self._parts

    @property
    def stored(self) -> None:
        """None, because the heads hold different numbers of pairs; see :attr:`parts`."""
        return

    @property
    def nbytes(self) -> int:
        """The sum over the parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def peak_nbytes(self) -> int:
        """The sum over the parts."""
        return sum(part.peak_nbytes for part in self.parts)

    @property
    def attended_pairs(self) -> float:
        """The mean over the heads."""
        parts = zip(self.groups.heads, self.parts, strict=True)
        return sum(len(heads) * part.attended_pairs for heads, part in parts) / self.groups.count

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        self.groups.check(key.shape[1])
        split = (self.groups.split(tensor) for tensor in (query, key, value))
        outputs = [part.attend(*tensors, scale) for part, *tensors in zip(self.parts, *split, strict=True)]
        self.seen += key.shape[2]
        return self.groups.join(outputs)

    def end_prompt(self) -> None:
        """See :class:`Stream`."""
        for part in self.parts:
            part.end_prompt()

    def count(self, tokens: int) -> None:
        """Count ``tokens`` new tokens whose pairs the caller has already written into the buffers of all parts."""
        for part in self.parts:
            assert isinstance(part, KeyValueStream)
            part.count(tokens)
        self.seen += tokens

    def rows(self, indices: Tensor) -> GroupedStream:
        """See :class:`Stream`."""
        return GroupedStream(self.groups, [part.rows(indices) for part in self.parts])
