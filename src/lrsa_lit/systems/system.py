"""Systems: KV-cache methods other than rules of partitions, such as one selection at the end of the prompt.

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
"""The token ids of a text, without special tokens."""


class Repeat(NamedTuple):
    """Tokens that the model reads after a prompt, to show which pairs of a part of the prompt it needs.

    Attributes:
        start: index in the prompt of the part's first token.
        stop: index after the part's last token.
        ids: the tokens to read.
    """

    start: int
    stop: int
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer that a system is applied to.

    Attributes:
        layer: its index.
        rotary: the rotation of its keys; None unless the system needs it.
    """

    layer: int
    rotary: Rotary | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """The sizes of a model that determine the cache bytes of one key-value head.

    Attributes:
        group: query heads per key-value head.
        dim: channels of a key, and of a value.
        itemsize: bytes per number.
        latent: bytes per token and head in a cache of latents, mean over layers; None if the model has no such cache.
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
    """A KV-cache method that replaces the rule in all layers that are not dense: ``LRSAConfig(system=…)``.

    Subclasses are frozen dataclasses, so that they compare and hash. A system that can be set to a cache budget names
    its ``budget_field`` and computes the pairs it has :meth:`held`.

    Attributes:
        budget_field: the field that a budget sets; "" if no field does. It is an integer size, unless :meth:`sized` is
            overridden.
        trains: whether :meth:`attend` gives the outputs of the streams and has gradients. Then a model can be trained
            with it, and losses need no cache.
        needs_rotary: whether it removes the rotation of keys.
        needs_whole_prompt: whether a prompt must come in one call.
        graphable: whether the parts of its streams are KeyValueStreams after the prompt, so that single tokens can be
            decoded by a CUDA graph. Unless ``rows_differ``, they are equally full in all layers.
        answers_by_token: whether answers should come token by token, because the attention of a token depends on the
            other tokens of the same call, or because only single tokens of all rows attend together.
        rotates_by_slot: whether keys and queries are rotated by the slots of the cache instead of their positions.
        rows_differ: whether rows of a batch, layers and heads may hold different numbers of pairs after the prompt, so
            that each row needs its own stream.
        repeats_prompt: whether the model must read :meth:`repeats` before the prompt ends.
        question: whether the prompt ends after the question of the first turn instead of after the context. Systems
            that select from the prompt have it as a field, false by default.
    """

    kind: ClassVar[str] = "systems"
    trains: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    needs_whole_prompt: ClassVar[bool] = False
    answers_by_token: ClassVar[bool] = False
    graphable: ClassVar[bool] = False
    rotates_by_slot: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = False
    budget_field: ClassVar[str] = ""
    repeats_prompt: ClassVar[bool] = False
    question: bool = True

    @abstractmethod
    def stream(self, place: Place, impl: Impl) -> Stream:
        """An empty stream: the cache of one layer for equally long sequences."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, scale: float, place: Place
    ) -> Tensor:
        """Attention over whole sequences without a cache; dense causal attention unless overridden.

        Args:
            query: (B, Hq, T, D), rotated.
            key: (B, H, T, D), rotated; ``value`` likewise.
            value: as key.
            cu_seqlens: boundaries 0 … T of sequences packed in one row (B = 1). Sequences do not see each other.
            scale: factor of the scores.
            place: the layer.

        Returns:
            (B, Hq, T, D).
        """
        return dense_attention(query, key, value, cu_seqlens=cu_seqlens, scale=scale)

    def check(self, layers: int, heads: int) -> None:
        """Raise a UserError unless the system fits a model with these numbers of layers and key-value heads."""

    def of_layers(self, count: int) -> System:
        """The system for a model of ``count`` layers, used for cost estimates. Override it if layers differ."""
        return self

    def repeats(self, streams: Sequence[Stream], prompt: Sequence[int], encode: Encode | None) -> list[Repeat]:
        """Texts that the model must read after a prompt. Each is read separately and does not see the others.

        Args:
            streams: the streams of :meth:`end_prompt`; they record the attention of these texts.
            prompt: the prompt's token ids.
            encode: the tokenizer's encoding; None if there is no tokenizer.
        """
        return []

    def begin_repeat(self, streams: Sequence[Stream], repeat: Repeat) -> None:
        """Tell the streams which repeat is read next."""

    def cutting_before(self, tokens: int) -> System:
        """The system for a prompt that ``tokens`` more of the first turn follow; a size that counts them is reduced."""
        return self

    def end_prompt(self, streams: Sequence[Stream]) -> None:
        """End the prompt in the streams of all layers that are not dense, given in layer order."""
        for stream in streams:
            stream.end_prompt()

    @staticmethod
    def end_prompts(systems: Sequence[System], rows: Sequence[Sequence[Stream]]) -> None:
        """:meth:`end_prompt` of several rows, each with its own settings of the same system."""
        for system, streams in zip(systems, rows, strict=True):
            system.end_prompt(streams)

    def attended_pairs(self, length: int) -> int:
        """Query-key pairs of one head over a prompt; those of dense causal attention unless overridden."""
        return attended_pairs(length, None)

    def floor(self, tokens: int) -> int:
        """The smallest size for a prompt of ``tokens``. Override it if sinks or a window are always kept."""
        return 1

    def most(self, tokens: int) -> int:
        """The largest size that makes a difference for a prompt of ``tokens``."""
        return tokens

    def held(self, tokens: int) -> float:
        """Pairs held at the end of a prompt of ``tokens``, mean over the heads; all of them unless overridden.

        It must not decrease as the size grows.
        """
        return tokens

    def held_bytes(self, tokens: int, head: Head) -> float:
        """:meth:`held` in bytes. Override it if more than pairs is held."""
        return self.held(tokens) * head.pair

    def at_most(self, held: float, tokens: int, head: Head) -> System | None:
        """This system with the largest size that holds at most ``held`` bytes after ``tokens``; None if none does."""
        floor = self.floor(tokens)
        sizes = range(floor, max(self.most(tokens), floor) + 1)
        count = bisect.bisect_right(sizes, held, key=lambda size: self.sized(size).held_bytes(tokens, head))
        return self.sized(sizes[count - 1]) if count else None

    @property
    def sizes(self) -> tuple[str, ...]:
        """The fields that a budget sets, or leaves unread; empty if no budget can set the system."""
        return (self.budget_field,) if self.budget_field else ()

    def sized(self, size: int) -> System:
        """The same system with another size."""
        kind: Any = self
        found: System = dataclasses.replace(kind, **{self.budget_field: size})
        return found


def sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value (B, heads, T, D) of each packed sequence; empty sequences are skipped."""
    boundaries = (0, key.shape[2]) if cu_seqlens is None else checked_boundaries(cu_seqlens.tolist(), key.shape[2])
    for start, stop in itertools.pairwise(boundaries):
        yield query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
