"""One-shot selection: prefill the prompt densely, keep the best pairs of each head, then decode as usual.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of the prompt, D head_dim, n kept pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Rotary, Stream, attended_pairs
from lrsa_lit.ops.sparse_attention.buffer import PairBuffer
from lrsa_lit.ops.sparse_attention.compressors import gather_kept
from lrsa_lit.systems.moments import Moments
from lrsa_lit.systems.system import Place, System

_NUMBERS = 1 << 25
"""The most numbers in the keys of layers that are selected from at once; scores take a few times their memory."""


@dataclass(frozen=True)
class Prompt:
    """The complete prompt in one layer or several, for equally long rows. The rows of a layer are followed by the next.

    Attributes:
        key: (B, H, T, D), rotated; B counts the rows of all layers.
        value: (B, H, T, D).
        query: (B, H, G, w, D), rotated, of the last w tokens: the system's ``window``, or fewer in a shorter prompt.
        scale: factor of the attention logits.
        layers: the indices of the layers.
        rotary: the rotation of the keys; None unless the system needs it.
        moments: the moments of its queries without their rotation; None unless the system needs them.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    scale: float
    layers: tuple[int, ...]
    rotary: Rotary | None = None
    moments: Moments | None = None

    @classmethod
    def of_layers(cls, layers: Sequence[Prompt]) -> Prompt:
        """Prompts of one shape, scale and rotation, as one."""
        first = layers[0]
        if len(layers) == 1:
            return first
        key, value, query = map(torch.cat, zip(*((each.key, each.value, each.query) for each in layers), strict=True))
        moments = [each.moments for each in layers if each.moments is not None]
        numbers = tuple(number for each in layers for number in each.layers)
        joined = Moments.together(moments) if moments else None
        return cls(key, value, query, first.scale, numbers, first.rotary, joined)

    @property
    def tokens(self) -> int:
        """The number of tokens, T."""
        return self.key.shape[2]


class Wants:
    """What scores need besides keys and values; class attributes or fields.

    Attributes:
        window: how many of the prompt's last queries are needed.
        moments_from: the first token whose unrotated query counts in :class:`Moments`; None if none are needed.
    """

    window: int = 0
    moments_from: int | None = None


@dataclass(frozen=True)
class OneShot(Wants, System):
    """Keep the pairs with the highest scores when the prompt ends. All later pairs are kept.

    Args:
        kept: share of the prompt's pairs to keep, int(kept T) per head, including sinks and windows.
        pairs: number of pairs to keep instead of a share; all if the prompt is shorter. The number includes the first
            turn's question: if the prompt ends before the question, the question's tokens are subtracted, but at least
            1 pair is kept.
        question: whether the selection sees the first turn's question, as in papers whose last queries are the
            question's. If false, the prompt ends with the context, as in kvpress.
    """

    kept: float = 0.5
    pairs: int | None = None
    question: bool = field(default=False, kw_only=True)
    graphable: ClassVar[bool] = True
    budget_field: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        """Check each bound once."""
        share = is_weight(self.kept) and 0 < self.kept <= 1
        check_setting("kept", self.kept, share, "a number above 0 and at most 1")
        count = self.pairs is None or (is_integer(self.pairs) and self.pairs >= 1)
        check_setting("pairs", self.pairs, count, "an integer >= 1, or null for the share kept")
        check_setting("question", self.question, isinstance(self.question, bool), "true or false")

    @abstractmethod
    def scores(self, prompt: Prompt) -> Tensor:
        """Scores (B, H, T), at least float32. The n highest are kept; of equal scores the earlier."""

    def count(self, tokens: int) -> int:
        """The number n of pairs to keep of a prompt of ``tokens``, at least 1."""
        return self.share(tokens, self.pairs)

    def share(self, of: int, wanted: int | None) -> int:
        """``wanted`` out of ``of``, or the share ``kept`` if None, but at least 1."""
        # The small number is for products such as .29 * 100, which is 28.999….
        return max(1, min(int(self.kept * of + 1e-9) if wanted is None else wanted, of))

    def floor(self, tokens: int) -> int:
        """The sinks and the window, which are always kept."""
        return max(1, getattr(self, "sink_size", 0) + self.window)

    def held(self, tokens: int) -> float:
        """See :class:`System`."""
        return self.count(tokens)

    @property
    def sizes(self) -> tuple[str, ...]:
        """See :class:`System`."""
        return ("kept", *super().sizes) if self.budget_field else ()

    @property
    def least(self) -> int:
        """The fewest pairs to keep, however long the question is."""
        return 1

    def cutting_before(self, tokens: int) -> System:
        """See :class:`System`."""
        if self.pairs is None or not tokens:
            return self
        return self.sized(max(self.pairs - tokens, self.least))

    def end_prompt(self, streams: Sequence[Stream]) -> None:
        """See :class:`System`."""
        self.end_prompts([self], [streams])

    @staticmethod
    @torch.no_grad()
    def end_prompts(systems: Sequence[System], rows: Sequence[Sequence[Stream]]) -> None:
        """Select in all rows, then cut all of them."""
        own = zip((system for system in systems if isinstance(system, OneShot)), rows, strict=True)
        cut([selection for system, streams in own for selection in system.selections(streams)])

    def selections(self, streams: Sequence[Stream]) -> Iterator[tuple[Sequence[OneShotStream], Tensor]]:
        """Groups of layers, as large as memory allows, and the positions to keep of all their rows (B, H, n)."""
        for some in together(due(streams)):
            yield some, self.keep(Prompt.of_layers([stream.prompt() for stream in some]))

    def keep(self, prompt: Prompt) -> Tensor:
        """The positions to keep, (B, H, n) int64, ascending. If all are kept, no scores are computed.

        Rows and heads that keep fewer than others are padded with -1.
        """
        count = self.count(prompt.tokens)
        if count == prompt.tokens:
            return torch.arange(count, device=prompt.key.device).expand(*prompt.key.shape[:2], -1)
        return highest(self.scores(prompt), count)

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return OneShotStream(self, place, impl)


def due(streams: Sequence[Stream]) -> list[OneShotStream]:
    """The streams that have not selected from their prompt yet."""
    return [stream for stream in streams if isinstance(stream, OneShotStream) and stream.is_due]


def together(streams: Sequence[OneShotStream]) -> Iterator[list[OneShotStream]]:
    """Groups of layers to select from at once, because each call costs the host as much for one layer as for many."""
    alike: dict[object, list[OneShotStream]] = {}
    for stream in streams:
        key, _ = stream.buffer.filled
        alike.setdefault((stream.place.rotary, stream.scale, key.shape, key.device), []).append(stream)
    for some in alike.values():
        at_once = max(1, _NUMBERS // max(some[0].buffer.filled[0].numel(), 1))
        for start in range(0, len(some), at_once):
            yield some[start : start + at_once]


def cut(selections: Sequence[tuple[Sequence[OneShotStream], Tensor]]) -> None:
    """Keep only the pairs at some positions (B, H, n) of all rows of streams; the host waits once for each device."""
    on: dict[torch.device, list[tuple[Sequence[OneShotStream], Tensor]]] = {}
    for streams, kept in selections:
        on.setdefault(kept.device, []).append((streams, kept))
    for some in on.values():
        fetched = torch.cat([kept.flatten() for _, kept in some]).cpu().split([kept.numel() for _, kept in some])
        for (streams, kept), flat in zip(some, fetched, strict=True):
            positions = flat.view(kept.shape)
            counts = (positions >= 0).sum(dim=-1).tolist()
            rows = len(counts) // len(streams)
            for number, stream in enumerate(streams):
                own = slice(number * rows, (number + 1) * rows)
                # Layers that share a choice may be on different devices.
                stream.cut(kept[own].to(stream.buffer.filled[0].device), positions[own], counts[own])


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores (…, T), of equal scores the earlier: (…, count) int64, ascending."""
    # A stable sort, because torch.topk does not define the order of ties.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def ascending(places: Tensor, tokens: int) -> Tensor:
    """The places (…, n) below ``tokens`` in ascending order, then -1 for each of the others."""
    places = places.sort(dim=-1).values
    return places.masked_fill(places >= tokens, -1)


def forced(scores: Tensor, before: int, behind: int) -> Tensor:
    """Extend scores (B, H, …) by sinks ``before`` and a window ``behind``, which get the row's highest score plus 1."""
    batch, heads, _ = scores.shape
    most = scores.amax(dim=(1, 2)) if scores.shape[2] else scores.new_zeros(batch)
    ends = ((most + 1).view(-1, 1, 1).expand(batch, heads, count) for count in (before, behind))
    first, last = ends
    return torch.cat([first, scores, last], dim=2)


class OneShotStream(KeyValueStream):
    """Holds the whole prompt until it ends, then the pairs that its system keeps and all later pairs.

    Attributes:
        kept: (B, H, n) the kept positions, for analysis. They are on the CPU, because the cache does not need them.
            None before the selection.
    """

    def __init__(self, system: OneShot, place: Place, impl: Impl) -> None:
        super().__init__(None, impl)
        self.system, self.place = system, place
        self.kept: Tensor | None = None
        self._waiting: Tensor | None = None
        self._moments: Moments | None = None
        self.scale, self._cut_at, self._stayed = 1.0, 0, 0.0

    @property
    def nbytes(self) -> int:
        """Bytes stored, including queries and their moments until the selection."""
        queries = 0 if self._waiting is None else self._waiting.nbytes
        return super().nbytes + queries + (0 if self._moments is None else self._moments.nbytes)

    @property
    def attended_pairs(self) -> float:
        """The dense pairs of the prompt, then those of later tokens, which see the kept pairs and each other."""
        if self.kept is None:
            return super().attended_pairs
        later = self.seen - self._cut_at
        return attended_pairs(self._cut_at, None) + later * (self._stayed + (later + 1) / 2) + self._probed

    @property
    def is_due(self) -> bool:
        """Whether there is a prompt to select from. A second prompt, after an answer, is kept whole."""
        return self.kept is None and self._store is not None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See :class:`Stream`."""
        if self.kept is None:
            self.scale = scale
            self._take(query.unflatten(1, (key.shape[1], -1)))
        return super().attend(query, key, value, scale)

    @torch.no_grad()
    def _take(self, query: Tensor) -> None:
        """Store what the system needs of the queries (B, H, G, N, D) of the next tokens."""
        wants, count = self.system, query.shape[3]
        if wants.window:
            parts = [query] if self._waiting is None else [self._waiting, query]
            self._waiting = torch.cat(parts, dim=3)[:, :, :, -wants.window :].clone()
        if wants.moments_from is not None and (start := max(wants.moments_from - self.seen, 0)) < count:
            assert self.place.rotary is not None
            positions = torch.arange(self.seen + start, self.seen + count, device=query.device)
            new = Moments.of(self.place.rotary.unrotate(query[:, :, :, start:], positions))
            self._moments = new if self._moments is None else self._moments.with_those_of(new)

    def prompt(self) -> Prompt:
        """The prompt, before the selection."""
        key, value = self.buffer.filled
        query = key[:, :, None, :0] if self._waiting is None else self._waiting
        return Prompt(key, value, query, self.scale, (self.place.layer,), self.place.rotary, self._moments)

    def end_prompt(self) -> None:
        """Select, once."""
        self.system.end_prompt([self])

    def cut(self, kept: Tensor, positions: Tensor, counts: Sequence[Sequence[int]]) -> None:
        """Keep only some pairs, copied so that the others are freed.

        Args:
            kept: (B, H, n), their positions; -1 is padding.
            positions: the same on the CPU.
            counts: how many each head of each row keeps.
        """
        self._store_only(kept, counts)
        every = [count for heads in counts for count in heads]
        self.kept, self._stayed = positions[..., : max(every)].clone(), sum(every) / len(every)
        self._waiting, self._moments, self._cut_at = None, None, self.seen

    def _store_only(self, kept: Tensor, counts: Sequence[Sequence[int]]) -> None:
        """Store nothing but these pairs; all rows and heads have equally many."""
        kept = kept[..., : counts[0][0]]
        self._store = PairBuffer(*(gather_kept(held, kept) for held in self.buffer.filled))

    def rows(self, indices: Tensor) -> OneShotStream:
        """See :class:`Stream`."""
        other = type(self)(self.system, self.place, self.impl)
        other.seen, other.scale, other._probed = self.seen, self.scale, self._probed
        other._cut_at, other._stayed = self._cut_at, self._stayed
        if self._store is not None:
            share = len(indices) / len(self._store.whole[0])
            other._peak, other._probing = int(self._peak * share), int(self._probing * share)
        other._store = None if self._store is None else self._store.rows(indices)
        other.kept = None if self.kept is None else self.kept[indices.cpu()]
        other._waiting = None if self._waiting is None else self._waiting[indices]
        other._moments = None if self._moments is None else self._moments.rows(indices)
        return other
