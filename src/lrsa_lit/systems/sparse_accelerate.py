"""SparseAccelerate (arXiv 2412.06198): a sparse mask per head for the prompt, dense attention for the answer.

We had only the paper's abstract: three patterns, chosen per head at run time. The definitions here are those of the
MInference patterns (arXiv 2407.02490) with similar names; that the paper means these is our assumption.

Dimensions: B batch, H key-value heads, G query heads of each, T tokens of a prompt, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sdpa import sdpa
from lrsa_lit.ops.sparse_attention import Impl, KeyValueStream, Stream, fetch_numbers
from lrsa_lit.systems.at_once import queries_at_once
from lrsa_lit.systems.system import Place, System

PATTERNS = ("triangular", "interval_slash", "block_cluster")

Mask = Callable[[Tensor], Tensor]
"""From the indices (N,) of queries to their mask, bool, broadcastable to (B, H, G, N, T)."""


@dataclass(frozen=True)
class SparseAccelerate(System):
    """Mask the prompt in each head by the pattern that covers most of its dense attention; the cache keeps everything.

    A prompt must come in one call. Each query head uses the pattern with the highest recall: the dense probability
    inside the pattern, mean over the queries from ``recall_from`` on (over the second half of a shorter prompt). Masks
    are applied densely, so this measures quality and attended pairs and is not faster than dense attention.

    The default sizes are ours: from 4,096 tokens on, each pattern has about 900 keys per query.

    Args:
        initial: triangular pattern: number of first tokens that all queries see.
        local: triangular pattern: how far back each query sees.
        columns: interval-slash pattern: number of keys, those with the most attention from the last queries.
        diagonals: interval-slash pattern: number of distances, likewise.
        last_queries: interval-slash pattern: how many last queries decide.
        first_columns: interval-slash pattern: number of first keys that are always among the columns.
        near_diagonals: interval-slash pattern: number of nearest distances that are always among the diagonals.
        block: block-cluster pattern: tokens in a block.
        blocks: block-cluster pattern: blocks of keys that each block of queries sees, those with the highest product of
            means; its own block is added.
        recall_from: the first query that counts in the recall.
    """

    needs_whole_prompt: ClassVar[bool] = True
    graphable: ClassVar[bool] = True

    initial: int = 100
    local: int = 800
    columns: int = 100
    diagonals: int = 750
    last_queries: int = 64
    first_columns: int = 30
    near_diagonals: int = 30
    block: int = 64
    blocks: int = 14
    recall_from: int = 2500

    def __post_init__(self) -> None:
        """Check each bound once."""
        for name in ("local", "last_queries", "block", "blocks", "near_diagonals"):
            value = getattr(self, name)
            check_setting(name, value, is_integer(value) and value >= 1, "an integer >= 1")
        for name in ("initial", "columns", "diagonals", "first_columns", "recall_from"):
            value = getattr(self, name)
            check_setting(name, value, is_integer(value) and value >= 0, "an integer >= 0")

    def stream(self, place: Place, impl: Impl) -> Stream:
        """See :class:`System`."""
        return MaskedPromptStream(self, impl)


class MaskedPromptStream(KeyValueStream):
    """The whole past of a layer; masks apply in the first call, which is the prompt.

    Attributes:
        patterns: (B, H, G) int64, the index in :data:`PATTERNS` for each query head; None before the prompt.
        attended: (B, H, G) query-key pairs of the prompt.
    """

    rows_cost_alike: ClassVar[bool] = False

    def __init__(self, system: SparseAccelerate, impl: Impl) -> None:
        super().__init__(None, impl)
        self.system = system
        self.patterns: Tensor | None = None
        self.attended: Tensor | None = None
        # The pairs of each row that the host has fetched.
        self._ended, self._pairs = False, list[float]()

    @property
    def attended_pairs(self) -> float:
        """The pairs of the prompt, mean over the rows."""
        fetch_numbers([self])
        return super().attended_pairs if self.attended is None else sum(self._pairs) / len(self._pairs)

    def cost_of(self, row: int) -> tuple[float, float | None]:
        """See :class:`Stream`."""
        fetch_numbers([self])
        return super().attended_pairs if self.attended is None else self._pairs[row], None

    @property
    def on_device(self) -> Tensor | None:
        """See :class:`Stream`."""
        return None if self.attended is None or self._pairs else self.attended.double().mean(dim=(1, 2))

    def fetched(self, numbers: Sequence[float]) -> None:
        """See :class:`Stream`."""
        self._pairs = list(numbers)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As in :class:`Stream`; a UserError if a prompt comes in several calls."""
        if self._ended:
            return super().attend(query, key, value, scale)
        if self.seen:
            reason = "a prompt must come in one call, because its last queries choose the masks for all of it"
            raise UserError("input_ids", reason=reason)
        self.extend(key, value)
        grouped = query.unflatten(1, (key.shape[1], -1))
        masks = Masks(self.system, grouped, key, scale)
        self.patterns = masks.best()
        output, self.attended = masks.attend(self.patterns, value)
        return output.flatten(1, 2)

    def end_prompt(self) -> None:
        """From now on attention is dense."""
        self._ended = True

    def rows(self, indices: Tensor) -> MaskedPromptStream:
        """See :class:`Stream`."""
        other = MaskedPromptStream(self.system, self.impl)
        other.seen, other._ended = self.seen, self._ended
        other._store = None if self._store is None else self._store.rows(indices)
        other.patterns = None if self.patterns is None else self.patterns[indices]
        other.attended = None if self.attended is None else self.attended[indices]
        return other


class Masks:
    """The three patterns of each head of a prompt.

    Args:
        system: the sizes of the patterns.
        query: (B, H, G, T, D), rotated.
        key: (B, H, T, D), rotated.
        scale: factor of the scores.
    """

    def __init__(self, system: SparseAccelerate, query: Tensor, key: Tensor, scale: float) -> None:
        self.system, self.scale = system, scale
        dtype = torch.promote_types(key.dtype, torch.float32)
        self.query, self.key = query.to(dtype), key.to(dtype)
        self.tokens = key.shape[2]
        self.places = torch.arange(self.tokens, device=key.device)
        self.at_once = queries_at_once(query, self.tokens)
        self.masks: list[Mask] = [self._triangular, self._interval_slash(), self._block_cluster()]

    def best(self) -> Tensor:
        """(B, H, G) int64: the pattern with the highest recall; of equal ones the earlier."""
        return self.recalls().argmax(dim=0)

    def recalls(self) -> Tensor:
        """(3, B, H, G): the dense probability within each pattern, mean over queries."""
        first = self.system.recall_from if self.system.recall_from < self.tokens else self.tokens // 2
        total = self.query.new_zeros(len(PATTERNS), *self.query.shape[:3])
        for numbers in self.places[first:].split(self.at_once):
            probabilities = self._probabilities(numbers)
            for pattern, mask in enumerate(self.masks):
                total[pattern] += (probabilities * mask(numbers)).sum(dim=(-2, -1))
        return total / (self.tokens - first)

    def attend(self, patterns: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (B, H, G, T, D) through the pattern of each head, and the pairs (B, H, G) that it attends to."""
        outputs, pairs = [], torch.zeros_like(patterns)
        chosen = patterns[..., None, None]
        for numbers, queries in zip(
            self.places.split(self.at_once), self.query.split(self.at_once, dim=3), strict=True
        ):
            first, second, third = (mask(numbers) for mask in self.masks)
            mask = torch.where(chosen == 0, first, torch.where(chosen == 1, second, third))
            keys, values = (rows[:, :, None].expand(-1, -1, patterns.shape[2], -1, -1) for rows in (self.key, value))
            outputs.append(sdpa(queries, keys, values.to(keys.dtype), mask=mask, scale=self.scale))
            pairs += mask.sum(dim=(-2, -1))
        return torch.cat(outputs, dim=3).to(value.dtype), pairs

    def _causal(self, numbers: Tensor) -> Tensor:
        return self.places <= numbers[:, None]

    def _probabilities(self, numbers: Tensor) -> Tensor:
        """(B, H, G, N, T) of dense causal attention."""
        scores = self.query[:, :, :, numbers] @ self.key[:, :, None].mT * self.scale
        return scores.masked_fill(~self._causal(numbers), -torch.inf).softmax(dim=-1)

    def _triangular(self, numbers: Tensor) -> Tensor:
        near = numbers[:, None] - self.places <= self.system.local
        return self._causal(numbers) & (near | (self.places < self.system.initial))

    def _interval_slash(self) -> Mask:
        last = self.places[-self.system.last_queries :]
        probabilities = self._probabilities(last)
        away = last[:, None] - self.places
        columns = probabilities.sum(dim=-2)
        # Future tokens have probability 0, so their clamped distances add nothing.
        flat = away.clamp(min=0).flatten().expand(*probabilities.shape[:3], -1)
        diagonals = torch.zeros_like(columns).scatter_add(-1, flat, probabilities.flatten(-2))
        columns[..., : self.system.first_columns] = torch.inf
        diagonals[..., : self.system.near_diagonals] = torch.inf
        column, diagonal = (
            _marked(scores, count)
            for scores, count in ((columns, self.system.columns), (diagonals, self.system.diagonals))
        )

        def mask(numbers: Tensor) -> Tensor:
            distance = (numbers[:, None] - self.places).clamp(min=0)
            of_diagonals = diagonal[..., distance]
            # A query always sees itself.
            own = self.places == numbers[:, None]
            return self._causal(numbers) & (column[..., None, :] | of_diagonals | own)

        return mask

    def _block_cluster(self) -> Mask:
        size = self.system.block
        blocks = -(-self.tokens // size)
        spare = blocks * size - self.tokens

        def pooled(rows: Tensor) -> Tensor:
            means: Tensor = pad(rows, (0, 0, 0, spare)).unflatten(-2, (blocks, size)).mean(dim=-2)
            return means

        scores = pooled(self.query) @ pooled(self.key)[:, :, None].mT
        before = torch.ones(blocks, blocks, dtype=torch.bool, device=scores.device).tril()
        # A pooled score may leave a block of queries without its own block, and its first queries without any key.
        own = torch.eye(blocks, dtype=torch.bool, device=scores.device)
        kept = _marked(scores.masked_fill(~before, -torch.inf), self.system.blocks) & before | own

        def mask(numbers: Tensor) -> Tensor:
            of_blocks = kept[..., numbers // size, :]
            return self._causal(numbers) & of_blocks.repeat_interleave(size, dim=-1)[..., : self.tokens]

        return mask


def _marked(scores: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` highest scores of each row (…, M); of equal scores the earlier."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
