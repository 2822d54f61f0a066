"""What an LLM attends to where digests of a context stand in its place (IC-Former): all of a shorter sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Stream, attended_pairs
from lrsa_lit.systems.system import Place, System


@dataclass(frozen=True)
class ICFormer(System):
    """IC-Former (arXiv 2406.13618), as attention: dense over k digests of each chunk and the tokens around them.

    ``lrsa_lit.tasks.Digests`` makes them outside of the LLM, and is who makes this: no setting names it.

    Args:
        count: digests of a chunk (k).
        chunk: most tokens of one.
    """

    count: int
    chunk: int
    trains: ClassVar[bool] = True
    graphable: ClassVar[bool] = True

    def spans(self, length: int) -> list[tuple[int, int]]:
        """[start, stop) of the chunks of so many tokens: as few as can be, equal but for the last.

        The size is ceil(length / chunks), so the last chunk may be shorter.
        """
        if not length:
            return []
        size = -(-length // -(-length // self.chunk))
        return [(start, min(start + size, length)) for start in range(0, length, size)]

    def stream(self, place: Place, impl: Impl) -> Stream:
        """All pairs."""
        return KeyValueStream(None, impl)

    def held(self, tokens: int) -> float:
        """Those of the digests of so many tokens, as if the whole prompt were context."""
        return self.count * len(self.spans(tokens))

    def attended_pairs(self, length: int) -> int:
        """The same of the pairs, of the LLM alone."""
        return attended_pairs(self.count * len(self.spans(length)), None)

    def reading_pairs(self, length: int) -> int:
        """Query-key pairs of a head of a layer that reads so many tokens of context."""
        own = self.count * (self.count + 1) // 2
        return sum(self.count * (stop - start) + own for start, stop in self.spans(length))
