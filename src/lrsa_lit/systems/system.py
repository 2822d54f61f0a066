"""Systems: other ways to keep less of the past than a rule of partitions, such as one cut behind the prompt.

Dimensions: B batch, H key-value heads, Hq query heads, N new tokens, T tokens, D head_dim.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lrsa_lit.from_settings import FromSettings
from lrsa_lit.ops.sparse_attention import (
    Impl,
    Rotary,
    Stream,
    attended_pairs,
    checked_boundaries,
    dense_attention,
)

Encode = Callable[[str], list[int]]
"""The token ids of a text, without special ones."""


class Repeat(NamedTuple):
    """Tokens that the model reads behind a prompt, to show what it needs of a part of it.

    Attributes:
        start: of the part, counted in the prompt's tokens.
        stop: its end.
        ids: the tokens.
    """

    start: int
    stop: int
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer that a system works in.

    Attributes:
        layer: its number.
        rotary: the rotation of its keys; None where the system did not ask for it.
    """

    layer: int
    rotary: Rotary | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """What of a model decides the bytes of one of its key-value heads.

    Attributes:
        group: query heads that share it.
        dim: channels of a key, and of a value.
        itemsize: bytes of a number.
        latent: bytes that a cache of latents holds of a token for it, a mean where layers differ; None where the model
            has none.
    """

    group: int
    dim: int
    itemsize: int
    latent: float | None = None

    @property
    def pair(self) -> int:
        """Bytes of a key and a value."""
        return 2 * self.dim * self.itemsize

    @property
    def queries(self) -> int:
        """Bytes of a token's queries."""
        return self.group * self.dim * self.itemsize


class System(FromSettings, ABC):
    """What stands in the place of the rule in all layers that are not dense: ``LRSAConfig(system=…)``.

    Subclasses are frozen dataclasses, so that they compare and hash. One that can be set to a budget names its
    ``budget_field``, and says how much it has :meth:`held` then.

    Attributes:
        budget_field: the field that a budget sets; "" where none does. It is an integer, the size, unless :meth:`sized`
            is overridden.
        trains: whether :meth:`attend` is what its streams make of the same tokens, and has gradients: then a model can
            be trained under it, and losses need no cache.
        needs_rotary: whether it takes rotations off keys.
        needs_whole_prompt: whether a prompt must come in one call.
        graphable: whether its streams are KeyValueStreams, equally full in all layers once the prompt is over, so that
            a CUDA graph can serve single tokens.
        answers_by_token: whether what a token of an answer attends to depends on those that come in the same call.
        rows_differ: whether rows of a batch may hold different numbers of pairs behind the prompt, so that each then
            has a stream for itself.
        repeats_prompt: whether the model must read :meth:`repeats` before the prompt is over.
        question: whether its prompt ends behind the question of the first turn, and not behind the context. One that
            cuts has it as a field, false by default.
    """

    kind: ClassVar[str] = "systems"
    trains: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    needs_whole_prompt: ClassVar[bool] = False
    answers_by_token: ClassVar[bool] = False
    graphable: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = False
    budget_field: ClassVar[str] = ""
    repeats_prompt: ClassVar[bool] = False
    question: bool = True

    @abstractmethod
    def stream(self, place: Place, impl: Impl) -> Stream:
        """What a layer holds of the past of equally long sequences: empty."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, scale: float, place: Place
    ) -> Tensor:
        """The pass of whole sequences without a cache; unless it is overridden, dense causal attention.

        Args:
            query: (B, Hq, T, D), rotated.
            key: (B, H, T, D), rotated; ``value`` likewise.
            value: as key.
            cu_seqlens: boundaries 0 … T of sequences packed in one row (B = 1); none sees another.
            scale: factor of the scores.
            place: the layer.

        Returns:
            (B, Hq, T, D).
        """
        return dense_attention(query, key, value, cu_seqlens=cu_seqlens, scale=scale)

    def check(self, layers: int, heads: int) -> None:
        """Raise a UserError unless it suits a model of so many layers and key-value heads."""

    def of_layers(self, count: int) -> System:
        """The same for a model of so many layers, which a cost is worked out from; override it where layers differ."""
        return self

    def repeats(self, streams: Sequence[Stream], prompt: Sequence[int], encode: Encode | None) -> list[Repeat]:
        """What the model is to read behind a prompt, one after the other, each as if the others were not there.

        Args:
            streams: those of :meth:`end_prompt`, which note what they see.
            prompt: its token ids.
            encode: of the model's tokenizer; None if nobody has it.
        """
        return []

    def begin_repeat(self, streams: Sequence[Stream], repeat: Repeat) -> None:
        """Tell the streams what is read next."""

    def cutting_before(self, tokens: int) -> System:
        """What ends a prompt in its place where so many tokens of the first turn follow: a size counts them in it."""
        return self

    def end_prompt(self, streams: Sequence[Stream]) -> None:
        """The prompt is over: what the streams of all layers that are not dense, in their order, do then."""
        for stream in streams:
            stream.end_prompt()

    def attended_pairs(self, length: int) -> int:
        """Query-key pairs of one head over a prompt; unless it is overridden, those of dense causal attention."""
        return attended_pairs(length, None)

    def floor(self, tokens: int) -> int:
        """The least that its size can be for a prompt of so many: override it where sinks or a window always stay."""
        return 1

    def most(self, tokens: int) -> int:
        """The largest size that a prompt of so many tokens has a use for."""
        return tokens

    def held(self, tokens: int) -> float:
        """Pairs that are held at the end of a prompt of so many tokens, mean of the heads: all, unless overridden.

        It may not fall where the size grows.
        """
        return tokens

    def held_bytes(self, tokens: int, head: Head) -> float:
        """The same in bytes: override it where more than pairs is held."""
        return self.held(tokens) * head.pair

    def at_most(self, held: float, tokens: int, head: Head) -> System | None:
        """The largest of its kind that holds no more bytes at the end of so many tokens; None if none does."""
        floor = self.floor(tokens)
        sizes = range(floor, max(self.most(tokens), floor) + 1)
        count = bisect.bisect_right(sizes, held, key=lambda size: self.sized(size).held_bytes(tokens, head))
        return self.sized(sizes[count - 1]) if count else None

    def sized(self, size: int) -> System:
        """The same with another size."""
        kind: Any = self
        found: System = dataclasses.replace(kind, **{self.budget_field: size})
        return found


def sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Those (B, heads, T, D) of each packed sequence; empty ones are left out."""
    boundaries = (0, key.shape[2]) if cu_seqlens is None else checked_boundaries(cu_seqlens.tolist(), key.shape[2])
    for start, stop in itertools.pairwise(boundaries):
        yield query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
