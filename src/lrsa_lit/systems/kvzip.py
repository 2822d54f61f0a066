"""KVzip (arXiv 2505.23416): keep the pairs that a model needs to repeat its prompt.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of the prompt, D head_dim, S sinks, C tokens in
a part of the prompt, Q tokens that repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_integers, check_setting
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, Stream
from lrsa_lit.systems.adakv import UnequalStream, highest_together
from lrsa_lit.systems.at_once import queries_at_once
from lrsa_lit.systems.one_shot import OneShot, OneShotStream, Prompt
from lrsa_lit.systems.system import Encode, Place, Repeat

_NAMED = 8
"""The number of tokens before a part that the instruction quotes, except for the first part."""


@dataclass(frozen=True)
class KVzip(OneShot):
    """Keep the pairs that repeating the prompt attends to most, ranked over all heads and layers at once.

    After a prompt, the model reads an instruction and one part of the prompt, for each part in turn. This costs one
    more prefill in linear layers and two in attention. A pair's score is the highest attention probability that it gets
    from these queries, normalised over the sinks, the part and what they have read. So the selection needs no question.
    ``kept`` and ``pairs`` are means over heads and layers. Each row chooses separately, and dropped pairs are freed.

    kvpress's KVzipPress keeps the same pairs if four tokens precede the text: its parts start after the chat template's
    first tokens, ours after the sinks. It also takes the suffix from the template.

    Args:
        sink_size: number of first tokens, which are always kept and not scored.
        chunk: tokens in a part; the last part may be shorter.
        per_layer: share the budget only among the heads of the same layer.
        first: the instruction before the first part.
        later: the instruction before the other parts; the 8 tokens before the part follow it.
        suffix: text between the instruction and the part, such as the end of a turn and the start of the next.
    """

    sink_size: int = 4
    chunk: int = 2048
    per_layer: bool = False
    first: str = "\n\nRepeat the previous context exactly."
    later: str = "\n\nRepeat the part of the previous context exactly, starting with"
    suffix: str = "\n"
    rows_differ: ClassVar[bool] = True
    repeats_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 0, "sink_size")
        check_integers(self, 1, "chunk")
        enough = self.pairs is None or self.pairs >= self.sink_size
        check_setting("pairs", self.pairs, enough, f"at least the {self.sink_size} sinks, which are always kept")

    @property
    def least(self) -> int:
        """The sinks, which are always kept."""
        return max(1, self.sink_size)

    def scores(self, prompt: Prompt) -> Tensor:
        """Refused: the prompt alone does not determine the scores."""
        raise UserError("system", type(self).__name__, reason="needs calls of the model to score a prompt")

    def keep(self, prompt: Prompt) -> Tensor:
        """Refused: heads keep different numbers of pairs."""
        return self.scores(prompt)

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return RepeatStream(self, place, impl)

    def repeats(self, streams: Sequence[Stream], prompt: Sequence[int], encode: Encode | None) -> list[Repeat]:
        """An instruction and a part of the prompt, for each part; empty if all pairs stay or were selected before.

        Raises:
            UserError: ``encode`` is missing, or fewer pairs than sinks would be kept.
        """
        tokens = len(prompt)
        if not _due(streams) or self.count(tokens) == tokens:
            return []
        if self.count(tokens) < self.sink_size:
            reason = f"keeps {self.count(tokens)} of {tokens} tokens, fewer than the {self.sink_size} sinks"
            raise UserError("kept", self.kept, reason=reason)
        if encode is None:
            reason = "makes the model repeat its prompt, which needs the tokenizer: pass encode"
            raise UserError("system", type(self).__name__, reason=reason)
        found, suffix = [], encode(self.suffix)
        for start in range(self.sink_size, tokens, self.chunk):
            stop, is_first = min(start + self.chunk, tokens), start == self.sink_size
            asked = encode(self.first if is_first else self.later)
            named = [] if is_first else prompt[max(start - _NAMED, 0) : start]
            found.append(Repeat(start, stop, [*asked, *named, *suffix, *prompt[start:stop]]))
        return found

    def begin_repeat(self, streams: Sequence[Stream], repeat: Repeat) -> None:
        """See :class:`System`."""
        for stream in _due(streams):
            stream.part = slice(repeat.start, repeat.stop)

    def selections(self, streams: Sequence[Stream]) -> Iterator[tuple[Sequence[OneShotStream], Tensor]]:
        """Select from the prompt of one row.

        Raises:
            UserError: the model has not repeated the prompt.
        """
        due = _due(streams)
        for shared in [[stream] for stream in due] if self.per_layer else [due] if due else []:
            yield shared, self.share_out([stream.scores_for(self) for stream in shared])

    def share_out(self, scores: Sequence[Tensor]) -> Tensor:
        """The positions to keep in some layers: (layers, H, at most T), padded with -1.

        Args:
            scores: (1, H, T) for each layer. Ties go to the earlier layer, head and token.
        """
        together = torch.cat([layer.to(scores[0].device) for layer in scores])
        layers, heads, tokens = together.shape
        kept = highest_together(together.view(1, -1, tokens), layers * heads * self.count(tokens))
        return kept.view(layers, heads, -1)


class RepeatStream(UnequalStream):
    """Holds a prompt and the scores from its repetition.

    Attributes:
        part: the part of the prompt that is repeated next.
    """

    part = slice(0)

    def __init__(self, system: OneShot, place: Place, impl: Impl) -> None:
        super().__init__(system, place, impl)
        self._noted: list[Tensor] = []

    @property
    def scores(self) -> Tensor:
        """The scores for the stream's own system."""
        assert isinstance(self.system, KVzip)
        return self.scores_for(self.system)

    def scores_for(self, system: KVzip) -> Tensor:
        """Scores (B, H, T), at least float32; sinks have the highest. All ones if everything is kept."""
        key = self.buffer.filled[0]
        if system.count(self.seen) == self.seen:
            return key.new_ones(key.shape[:3])
        if sum(part.shape[2] for part in self._noted) != self.seen - system.sink_size:
            reason = "needs the model to repeat the prompt first: use lrsa_lit.attention.end_prompt"
            raise UserError("system", type(system).__name__, reason=reason)
        # Higher than any probability.
        return pad(torch.cat(self._noted, dim=2), (system.sink_size, 0), value=2.0)

    @property
    def nbytes(self) -> int:
        """Bytes stored, including the scores."""
        return super().nbytes + sum(part.nbytes for part in self._noted)

    def probe(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As in :class:`KeyValueStream`; also records the scores of the part."""
        system, past = self.system, self.buffer.filled[0]
        assert isinstance(system, KVzip)
        seen = torch.cat([past[:, :, : system.sink_size], past[:, :, self.part]], dim=2)
        grouped = query.unflatten(1, (key.shape[1], -1))
        self._noted.append(repeat_scores(grouped, seen, key, system.sink_size, scale))
        return super().probe(query, key, value, scale)

    def cut(self, kept: Tensor, positions: Tensor, counts: Sequence[Sequence[int]]) -> None:
        """As in :class:`UnequalStream`; also drops the scores."""
        self._peak = self.peak_nbytes
        super().cut(kept, positions, counts)
        self._noted = []

    def rows(self, indices: Tensor) -> RepeatStream:
        """See :class:`Stream`."""
        other = super().rows(indices)
        assert isinstance(other, RepeatStream)
        other.part, other._noted = self.part, [part[indices] for part in self._noted]
        return other


def _due(streams: Sequence[Stream]) -> list[RepeatStream]:
    return [stream for stream in streams if isinstance(stream, RepeatStream) and stream.is_due]


def repeat_scores(query: Tensor, key: Tensor, own: Tensor, sinks: int, scale: float) -> Tensor:
    """The highest probability that each key of a part gets from the queries of the repetition.

    Returns (B, H, C), at least float32.

    Args:
        query: (B, H, G, Q, D).
        key: (B, H, S + C, D), keys of the prompt: sinks, then the part. All queries see them.
        own: (B, H, Q, D), keys of the queries' own tokens, seen causally.
        sinks: S.
        scale: factor of the scores.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    keys, past = torch.cat([key, own], dim=2).to(dtype), key.shape[2]
    most = keys.new_zeros(*key.shape[:2], past - sinks)
    at_once = queries_at_once(query, keys.shape[2])
    for start in range(0, own.shape[2], at_once):
        some = query[:, :, :, start : start + at_once]
        group, count = some.shape[2:4]
        logits = (some.flatten(2, 3).to(dtype) @ keys.mT * scale).unflatten(2, (group, count))
        hidden = logits.new_ones(count, keys.shape[2], dtype=torch.bool).triu(past + start + 1)
        given = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)[..., sinks:past]
        most = torch.maximum(most, given.amax(dim=(2, 3)))
    return most
