"""One cut behind the prompt: dense prefill of all of it, the best pairs of each head stay, then ordinary decoding.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of the prompt, D head_dim, n pairs that stay.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Stream
from lrsa_lit.ops.sparse_attention.buffer import PairBuffer
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.systems.system import Place, System


@dataclass(frozen=True)
class Prompt:
    """A prompt of equally long rows in one layer, all of it in the cache.

    Attributes:
        key: (B, H, T, D), rotated.
        value: (B, H, T, D).
        query: (B, H, G, w, D), rotated: those of its last w tokens, as many as the system asks for and there are.
        scale: factor of the scores.
        place: the layer.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    scale: float
    place: Place


@dataclass(frozen=True)
class OneShot(System):
    """Keep the pairs of the highest scores when the prompt ends; those of the answer are all kept.

    Args:
        kept: the share of a prompt's pairs that stay, sinks and windows among them: int(kept T) of each head.
        pairs: so many instead of a share; all where a prompt has fewer.

    Attributes:
        window: how many of the last queries the scores are made of.
    """

    kept: float = 0.5
    pairs: int | None = None
    window: ClassVar[int] = 0
    graphable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check each bound once."""
        share = isinstance(self.kept, int | float) and 0 < self.kept <= 1
        check_setting("kept", self.kept, share, "a number above 0 and at most 1")
        count = self.pairs is None or (is_integer(self.pairs) and self.pairs >= 1)
        check_setting("pairs", self.pairs, count, "an integer >= 1, or null for the share kept")

    @abstractmethod
    def scores(self, prompt: Prompt) -> Tensor:
        """(B, H, T), at least float32; the n highest stay, of equal ones the earlier."""

    def count(self, tokens: int) -> int:
        """N of a prompt of so many tokens, at least 1."""
        # A product such as .29 * 100 is 28.999….
        wanted = int(self.kept * tokens + 1e-9) if self.pairs is None else self.pairs
        return max(1, min(wanted, tokens))

    def keep(self, prompt: Prompt) -> Tensor:
        """(B, H, n) int64 positions, ascending."""
        order = self.scores(prompt).sort(dim=-1, descending=True, stable=True).indices
        return order[..., : self.count(prompt.key.shape[2])].sort(dim=-1).values

    def stream(self, place: Place, impl: Impl) -> Stream:
        """As :class:`System` has it."""
        return OneShotStream(self, place, impl)


class OneShotStream(KeyValueStream):
    """All of a prompt until it ends, then what its system keeps of it, and all of the answer.

    Attributes:
        kept: (B, H, n) the positions that stayed; None before the cut.
    """

    def __init__(self, system: OneShot, place: Place, impl: Impl) -> None:
        super().__init__(None, impl)
        self.system, self.place = system, place
        self.kept: Tensor | None = None
        self._waiting: Tensor | None = None
        self._scale = 1.0

    @property
    def nbytes(self) -> int:
        """Those of queries that wait for the cut as well."""
        queries = 0 if self._waiting is None else self._waiting.numel() * self._waiting.element_size()
        return super().nbytes + queries

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As :class:`Stream` has it."""
        if self.kept is None and self.system.window:
            grouped, self._scale = query.unflatten(1, (key.shape[1], -1)), scale
            parts = [grouped] if self._waiting is None else [self._waiting, grouped]
            self._waiting = torch.cat(parts, dim=3)[:, :, :, -self.system.window :].clone()
        return super().attend(query, key, value, scale)

    def prompt(self) -> Prompt:
        """What the scores are made of, before the cut."""
        key, value = self.buffer.filled
        nothing = key[:, :, None, :0]
        return Prompt(key, value, nothing if self._waiting is None else self._waiting, self._scale, self.place)

    @torch.no_grad()
    def end_prompt(self) -> None:
        """Cut; a second prompt behind an answer is kept whole."""
        if self.kept is None and self._store is not None:
            self.cut(self.system.keep(self.prompt()))

    def cut(self, kept: Tensor) -> None:
        """Let the pairs (B, H, n) at some positions stay, in memory of their own."""
        key, value = self.buffer.filled
        self._store = PairBuffer(gather_kept(key, kept), gather_kept(value, kept))
        self.kept, self._waiting = kept, None

    def most_stored(self, tokens: int) -> int:
        """As :class:`KeyValueStream` has it."""
        return self.buffer.length + tokens

    def rows(self, indices: Tensor) -> OneShotStream:
        """As :class:`Stream` has it."""
        other = OneShotStream(self.system, self.place, self.impl)
        other.seen, other._scale = self.seen, self._scale
        other._store = None if self._store is None else self._store.rows(indices)
        other.kept = None if self.kept is None else self.kept[indices]
        other._waiting = None if self._waiting is None else self._waiting[indices]
        return other


@dataclass(frozen=True)
class KeyNorm(OneShot):
    """Keep the keys of the smallest norms (Devoto et al., arXiv 2406.11430)."""

    def scores(self, prompt: Prompt) -> Tensor:
        """Minus the norm."""
        norms: Tensor = prompt.key.to(torch.promote_types(prompt.key.dtype, torch.float32)).norm(dim=-1)
        return -norms


@dataclass(frozen=True)
class StreamingLLM(OneShot):
    """Keep the first tokens and the last ones (arXiv 2309.17453), at their original positions.

    Args:
        sink_size: how many of the first.
    """

    sink_size: int = 4

    def __post_init__(self) -> None:
        """Check each bound once."""
        super().__post_init__()
        count = is_integer(self.sink_size) and self.sink_size >= 0
        check_setting("sink_size", self.sink_size, count, "an integer >= 0")

    def scores(self, prompt: Prompt) -> Tensor:
        """The position, and the highest for sinks."""
        tokens = prompt.key.shape[2]
        places = torch.arange(tokens, dtype=torch.float32, device=prompt.key.device)
        forced = pad(places[self.sink_size :], (min(self.sink_size, tokens), 0), value=tokens)
        return forced.expand(prompt.key.shape[:3])
