"""One-shot selection of chunks of consecutive tokens: ChunkKV (arXiv 2502.00299).

Dimensions: B batch, H key-value heads, T tokens of the prompt, c tokens of a chunk, w window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsa_lit.bounds import check_integers
from lrsa_lit.ops.sparse_attention import Stream
from lrsa_lit.ops.sparse_attention.scoring import runs_of
from lrsa_lit.systems.one_shot import OneShot, OneShotStream, Prompt, ascending, due, highest, together
from lrsa_lit.systems.query_scores import window_attention
from lrsa_lit.systems.rescored import Rescored


@dataclass(frozen=True)
class ChunkKVPress(Rescored):
    """Keep the chunks with the highest mean scores, the same in all heads, as kvpress's ChunkKVPress.

    ``kept`` is a share of the chunks, and ``pairs`` is divided by the chunk size, but at least one chunk is kept. The
    last chunk counts fully, even if it is shorter. So the number of kept pairs can be off by up to a chunk. Unlike in
    kvpress, each row of a batch chooses separately.

    Args:
        size: tokens in a chunk. In a shorter prompt, single tokens are chosen by the scorer.
    """

    size: int = 20
    rows_differ: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "size")

    def floor(self, tokens: int) -> int:
        """One chunk, and at least the pairs that the scorer always keeps."""
        return max(self.size, super().floor(tokens))

    def held(self, tokens: int) -> float:
        """An upper bound: the last chunk may be shorter, and a later question may fill up what chunks leave."""
        if tokens < self.size or self.count(tokens) == tokens or not (self.question or self.pairs is None):
            return self.count(tokens)
        return min(tokens, self._chosen(-(-tokens // self.size)) * self.size)

    def keep(self, prompt: Prompt) -> Tensor:
        """The positions to keep; rows that keep the shorter last chunk are padded with -1."""
        tokens = prompt.tokens
        if tokens < self.size or self.count(tokens) == tokens:
            return super().keep(prompt)
        sums, lengths = chunk_sums(self.scores(prompt).sum(dim=1), self.size)
        chosen = highest(sums / lengths, self._chosen(len(lengths)))
        kept = ascending(tokens_of(chosen, self.size), tokens)
        return kept[:, None].expand(-1, prompt.key.shape[1], -1)

    def _chosen(self, chunks: int) -> int:
        """How many of the chunks are kept."""
        return self.share(chunks, None if self.pairs is None else self.pairs // self.size)


@dataclass(frozen=True)
class ChunkKV(OneShot):
    """Keep the last tokens and the chunks that their queries attend to most in sum, as in the paper.

    For n pairs, floor(n / size) chunks are chosen, and the window's tokens replace the last ones of the chosen tokens.
    The paper does not say whether heads choose together; here they do, as in kvpress.

    Args:
        size: tokens in a chunk; the last may be shorter.
        window: how many last queries score; their tokens are always kept. The paper uses 4 to 32. A prompt of at most
            ``window`` tokens is kept whole.
        reuse: number of consecutive layers that keep the same tokens, chosen by the first of them (2 in the paper).
    """

    size: int = 10
    window: int = 16
    reuse: int = 1
    rows_differ: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "size", "window", "reuse")

    def count(self, tokens: int) -> int:
        """As in :class:`OneShot`, but all tokens if the window covers the prompt."""
        return tokens if tokens <= self.window else super().count(tokens)

    def scores(self, prompt: Prompt) -> Tensor:
        """The sum of probabilities over the queries of all heads."""
        received = window_attention(prompt).sum(dim=(1, 2, 3))
        return received[:, None].expand(-1, prompt.key.shape[1], -1)

    def keep(self, prompt: Prompt) -> Tensor:
        """The positions to keep; rows that keep the shorter last chunk are padded with -1."""
        tokens, count = prompt.tokens, self.count(prompt.tokens)
        if count == tokens:
            return super().keep(prompt)
        past, window = tokens - self.window, torch.arange(tokens - self.window, tokens, device=prompt.key.device)
        sums, _ = chunk_sums(self.scores(prompt)[:, 0], self.size)
        body = tokens_of(highest(sums, count // self.size), self.size)[:, : max(count - self.window, 0)]
        # The last chunk has no tokens of the window.
        body = body.masked_fill(body >= past, tokens)
        kept = ascending(torch.cat([body, window.expand(len(body), -1)], dim=1), tokens)
        return kept[:, None].expand(-1, prompt.key.shape[1], -1)

    def selections(self, streams: Sequence[Stream]) -> Iterator[tuple[Sequence[OneShotStream], Tensor]]:
        """Select in all layers at once; the first layer of a group that is not dense chooses for the group."""
        groups: dict[int, list[OneShotStream]] = {}
        for stream in due(streams):
            groups.setdefault(stream.place.layer // self.reuse, []).append(stream)
        for some in together([group[0] for group in groups.values()]):
            kept = self.keep(Prompt.of_layers([first.prompt() for first in some])).chunk(len(some))
            members = [groups[first.place.layer // self.reuse] for first in some]
            own = [part for part, group in zip(kept, members, strict=True) for _ in group]
            yield [stream for group in members for stream in group], torch.cat(own)


def chunk_sums(of_tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums (B, chunks) of the tokens' numbers (B, T), and the lengths (chunks,) of the chunks."""
    runs = runs_of(of_tokens, size, 0.0)
    lengths = of_tokens.shape[-1] - size * torch.arange(runs.shape[-2], device=runs.device)
    return runs.sum(dim=-1), lengths.clamp(max=size)


def tokens_of(chunks: Tensor, size: int) -> Tensor:
    """The positions (B, n size) in the chunks (B, n), as if the last chunk were whole."""
    return (chunks[..., None] * size + torch.arange(size, device=chunks.device)).flatten(1)
