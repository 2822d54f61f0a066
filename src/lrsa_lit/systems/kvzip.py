"""KVzip (arXiv 2505.23416): keep the pairs that a model needs to repeat its prompt.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of the prompt, D head_dim, S sinks, C tokens of
a part of the prompt, Q tokens that repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_integers, check_setting
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, Stream
from lrsa_lit.systems.adakv import UnequalStream, highest_together
from lrsa_lit.systems.one_shot import OneShot, Prompt
from lrsa_lit.systems.system import Encode, Place, Repeat

_QUERIES = 256
"""Probabilities of so many are in memory at a time."""
_NAMED = 8
"""A part that is not the first is asked for by so many tokens in front of it."""


@dataclass(frozen=True)
class KVzip(OneShot):
    """Keep the pairs that repeating the prompt attends to, the best over all heads and layers at once.

    Behind a prompt the model reads, for each part of it, an instruction and that part, which takes about one more
    prefill. A pair's score is the highest probability that one of these queries gives it, among the sinks, its part and
    what is read. So it needs no question. ``kept`` and ``pairs`` are means over heads and layers, each row chooses for
    itself, and what is dropped is gone. kvpress's KVzipPress keeps the same pairs where four tokens precede the text:
    its parts begin behind what a chat template puts there, and ours behind the sinks. It reads the suffix from the
    template as well.

    Args:
        sink_size: first tokens that always stay, and are not scored.
        chunk: tokens of a part; the last may have fewer.
        per_layer: share the budget over the heads of each layer alone.
        first: the instruction in front of the first part.
        later: that in front of the others, followed by the 8 tokens before the part.
        suffix: between the instruction and the part, such as the end of a turn and the beginning of the answer's.
    """

    sink_size: int = 4
    chunk: int = 2048
    per_layer: bool = False
    first: str = "\n\nRepeat the previous context exactly."
    later: str = "\n\nRepeat the part of the previous context exactly, starting with"
    suffix: str = "\n"
    graphable: ClassVar[bool] = False
    rows_differ: ClassVar[bool] = True
    repeats_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 0, "sink_size")
        check_integers(self, 1, "chunk")
        enough = self.pairs is None or self.pairs >= self.sink_size
        check_setting("pairs", self.pairs, enough, f"at least the {self.sink_size} sinks, which always stay")

    @property
    def least(self) -> int:
        """The sinks, which always stay."""
        return max(1, self.sink_size)

    def scores(self, prompt: Prompt) -> Tensor:
        """Refused: a prompt alone has none."""
        raise UserError("system", type(self).__name__, reason="scores pairs by calls of the model, not by a prompt")

    def keep(self, prompt: Prompt) -> Tensor:
        """Refused: heads keep differently many."""
        return self.scores(prompt)

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return RepeatStream(self, place, impl)

    def repeats(self, streams: Sequence[Stream], prompt: Sequence[int], encode: Encode | None) -> list[Repeat]:
        """An instruction and the part, for each part; nothing where all pairs stay, or were cut before.

        Raises:
            UserError: nobody can encode the instruction, or fewer pairs than sinks are to stay.
        """
        tokens = len(prompt)
        if not _due(streams) or self.count(tokens) == tokens:
            return []
        if self.count(tokens) < self.sink_size:
            reason = f"leaves {self.count(tokens)} of {tokens} tokens, fewer than the {self.sink_size} sinks"
            raise UserError("kept", self.kept, reason=reason)
        if encode is None:
            reason = "has the model repeat its prompt, which takes its tokenizer: pass encode"
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

    def end_prompt(self, streams: Sequence[Stream]) -> None:
        """Cut those of a row.

        Raises:
            UserError: its prompt was not repeated.
        """
        due = _due(streams)
        for shared in [[stream] for stream in due] if self.per_layer else [due] if due else []:
            kept = self.share_out([stream.scores_for(self) for stream in shared])
            for stream, positions in zip(shared, kept, strict=True):
                stream.cut(positions[None])

    def share_out(self, scores: Sequence[Tensor]) -> Tensor:
        """The positions that stay in some layers, as :func:`highest_together` has them: (layers, H, most of a head).

        Args:
            scores: (1, H, T) of each; of equal ones those of earlier layers, heads and tokens are higher.
        """
        together = torch.cat([layer.to(scores[0].device) for layer in scores])
        layers, heads, tokens = together.shape
        kept = highest_together(together.view(1, -1, tokens), layers * heads * self.count(tokens))
        return kept.view(layers, heads, -1)


class RepeatStream(UnequalStream):
    """A prompt, and what its repetition attends to.

    Attributes:
        part: of the prompt that is repeated next.
    """

    part = slice(0)

    def __init__(self, system: OneShot, place: Place, impl: Impl) -> None:
        super().__init__(system, place, impl)
        self._noted: list[Tensor] = []

    @property
    def scores(self) -> Tensor:
        """Those for its own system."""
        assert isinstance(self.system, KVzip)
        return self.scores_for(self.system)

    def scores_for(self, system: KVzip) -> Tensor:
        """(B, H, T), at least float32: sinks have the highest; ones where all stay and nothing was repeated."""
        key = self.buffer.filled[0]
        if system.count(self.seen) == self.seen:
            return key.new_ones(key.shape[:3])
        if sum(part.shape[2] for part in self._noted) != self.seen - system.sink_size:
            reason = "cuts a prompt that the model has repeated: use lrsa_lit.attention.end_prompt"
            raise UserError("system", type(system).__name__, reason=reason)
        # No probability is as high.
        return pad(torch.cat(self._noted, dim=2), (system.sink_size, 0), value=2.0)

    @property
    def nbytes(self) -> int:
        """Those of the scores as well."""
        return super().nbytes + sum(part.nbytes for part in self._noted)

    def probe(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As :class:`KeyValueStream` has it; the part gets its scores."""
        system, past = self.system, self.buffer.filled[0]
        assert isinstance(system, KVzip)
        seen = torch.cat([past[:, :, : system.sink_size], past[:, :, self.part]], dim=2)
        grouped = query.unflatten(1, (key.shape[1], -1))
        self._noted.append(repeat_scores(grouped, seen, key, system.sink_size, scale))
        return super().probe(query, key, value, scale)

    def cut(self, kept: Tensor) -> None:
        """As :class:`UnequalStream` has it; the scores are gone then."""
        self._peak = self.peak_nbytes
        super().cut(kept.to(self.buffer.filled[0].device))
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
    """The highest probability that any query of a repetition gives each key of a part: (B, H, C), at least float32.

    Args:
        query: (B, H, G, Q, D).
        key: (B, H, S + C, D), the prompt's: sinks, then the part. All queries see them.
        own: (B, H, Q, D), those of the queries' tokens, seen causally.
        sinks: S.
        scale: factor of the scores.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    keys, past = torch.cat([key, own], dim=2).to(dtype), key.shape[2]
    most = keys.new_zeros(*key.shape[:2], past - sinks)
    for start in range(0, own.shape[2], _QUERIES):
        some = query[:, :, :, start : start + _QUERIES]
        group, count = some.shape[2:4]
        logits = (some.flatten(2, 3).to(dtype) @ keys.mT * scale).unflatten(2, (group, count))
        hidden = logits.new_ones(count, keys.shape[2], dtype=torch.bool).triu(past + start + 1)
        given = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)[..., sinks:past]
        most = torch.maximum(most, given.amax(dim=(2, 3)))
    return most
