"""The attention of an LLM that reads digests instead of its context (IC-Former): dense, over a shorter sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Stream, attended_pairs
from lrsa_lit.systems.system import Place, System


@dataclass(frozen=True)
class ICFormer(System):
    """The attention of IC-Former (arXiv 2406.13618): dense over k digests per chunk and the tokens around them.

    ``lrsa_lit.tasks.Digests`` makes the digests outside the LLM. It also creates this system, which no setting names.

    Args:
        count: digests per chunk (k).
        chunk: the most tokens in a chunk.
    """

    count: int
    chunk: int
    trains: ClassVar[bool] = True
    graphable: ClassVar[bool] = True

    def spans(self, length: int) -> list[tuple[int, int]]:
        """[start, stop) of the chunks of ``length`` tokens: as few chunks as possible, of equal size.

        The size is ceil(length / chunks), so the last chunk may be shorter.
        """
        if not length:
            return []
        size = -(-length // -(-length // self.chunk))
        return [(start, min(start + size, length)) for start in range(0, length, size)]

    def stream(self, place: Place, impl: Impl) -> Stream:
        """A stream that keeps all pairs."""
        return KeyValueStream(None, impl)

    def held(self, tokens: int) -> float:
        """The number of digests of ``tokens``, as if the whole prompt were context."""
        return self.count * len(self.spans(tokens))

    def attended_pairs(self, length: int) -> int:
        """Query-key pairs of the LLM over these digests; those of the reader are not included."""
        return attended_pairs(self.count * len(self.spans(length)), None)

    def reading_pairs(self, length: int) -> int:
        """Query-key pairs of one head, in one layer of the reader, over ``length`` tokens of context."""
        own = self.count * (self.count + 1) // 2
        return sum(self.count * (stop - start) + own for start, stop in self.spans(length))
