"""One cut that keeps or drops runs of consecutive tokens: ChunkKV (arXiv 2502.00299).

Dimensions: B batch, H key-value heads, T tokens of the prompt, c tokens of a chunk, w window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_integers
from lrsa_lit.ops.sparse_attention import Stream
from lrsa_lit.ops.sparse_attention.scoring import runs_of
from lrsa_lit.systems.one_shot import OneShot, Prompt, due, highest
from lrsa_lit.systems.query_scores import window_attention
from lrsa_lit.systems.rescored import Rescored


@dataclass(frozen=True)
class ChunkKVPress(Rescored):
    """Keep the chunks of the highest mean scores, the same in all heads, as kvpress's ChunkKVPress.

    A share kept is that of chunks, and ``pairs`` gives as many as these hold, but at least one; the last chunk, which
    may be shorter, counts as one. So the pairs that stay miss the number by up to a chunk. Unlike there, each row of a
    batch chooses for itself.

    Args:
        size: tokens of a chunk; a prompt that has fewer is cut as the scorer alone cuts it.
    """

    size: int = 20
    rows_differ: ClassVar[bool] = True
    graphable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "size")

    def floor(self, tokens: int) -> int:
        """A chunk, and what the scorer keeps in any case."""
        return max(self.size, super().floor(tokens))

    def held(self, tokens: int) -> float:
        """At most: the last chunk may be shorter, and a question behind the cut may fill what chunks leave."""
        if tokens < self.size or self.count(tokens) == tokens or not (self.question or self.pairs is None):
            return self.count(tokens)
        return min(tokens, self._chosen(-(-tokens // self.size)) * self.size)

    def keep(self, prompt: Prompt) -> Tensor:
        """(B, H, n), of rows that keep equally many."""
        tokens = prompt.tokens
        if tokens < self.size or self.count(tokens) == tokens:
            return super().keep(prompt)
        sums, lengths = chunk_sums(self.scores(prompt).sum(dim=1), self.size)
        chosen = highest(sums / lengths, self._chosen(len(lengths)))
        rows = [tokens_of(chunks, self.size, tokens) for chunks in chosen]
        return torch.stack(rows)[:, None].expand(-1, prompt.key.shape[1], -1)

    def _chosen(self, chunks: int) -> int:
        """How many of so many chunks stay."""
        return self.share(chunks, None if self.pairs is None else self.pairs // self.size)


@dataclass(frozen=True)
class ChunkKV(OneShot):
    """Keep the chunks that the last queries attend to most in sum, and their own tokens, as the paper has it.

    Of n pairs floor(n / size) chunks are kept, and the tokens of the window take the place of the last of them. The
    paper leaves open whether heads choose together; here they do, as in kvpress.

    Args:
        size: tokens of a chunk; the last may be shorter.
        window: queries that score; the paper takes 4 to 32. No more than these stay where n is less, and a prompt that
            has no other tokens is not cut.
        reuse: layers that keep the same tokens, those of the first of them (2 in the paper's experiments).
    """

    size: int = 10
    window: int = 16
    reuse: int = 1
    rows_differ: ClassVar[bool] = True
    graphable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "size", "window", "reuse")

    def count(self, tokens: int) -> int:
        """As :class:`OneShot` has it; all where the window holds them."""
        return tokens if tokens <= self.window else super().count(tokens)

    def scores(self, prompt: Prompt) -> Tensor:
        """The sum of the probabilities over queries and all heads."""
        received = window_attention(prompt).sum(dim=(1, 2, 3))
        return received[:, None].expand(-1, prompt.key.shape[1], -1)

    def keep(self, prompt: Prompt) -> Tensor:
        """(B, H, n), of rows that keep equally many."""
        tokens, count = prompt.tokens, self.count(prompt.tokens)
        if count == tokens:
            return super().keep(prompt)
        past, window = tokens - self.window, torch.arange(tokens - self.window, tokens, device=prompt.key.device)
        sums, _ = chunk_sums(self.scores(prompt)[:, 0], self.size)
        bodies = [tokens_of(chunks, self.size, past) for chunks in highest(sums, count // self.size)]
        rows = [torch.cat([body[: max(count - self.window, 0)], window]) for body in bodies]
        return torch.stack(rows)[:, None].expand(-1, prompt.key.shape[1], -1)

    @torch.no_grad()
    def end_prompt(self, streams: Sequence[Stream]) -> None:
        """Cut each layer where the first of its group chooses, of those that are not dense."""
        kept: dict[int, Tensor] = {}
        for stream in due(streams):
            group = stream.place.layer // self.reuse
            if group not in kept:
                kept[group] = self.keep(stream.prompt())
            stream.cut(kept[group])


def chunk_sums(of_tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums (B, chunks) of what tokens (B, T) have, and the lengths (chunks,) of the chunks."""
    runs = runs_of(of_tokens, size, 0.0)
    lengths = of_tokens.shape[-1] - size * torch.arange(runs.shape[-2], device=runs.device)
    return runs.sum(dim=-1), lengths.clamp(max=size)


def tokens_of(chunks: Tensor, size: int, stop: int) -> Tensor:
    """The positions below ``stop`` in some chunks (n,), ascending."""
    places = (chunks[:, None] * size + torch.arange(size, device=chunks.device)).flatten()
    return places[places < stop]
