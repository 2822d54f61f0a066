"""What selections are worth: does the evidence survive, do layers agree, which tokens are kept.

Only tokens in compressed partitions count, so that the sinks and the raw window, which everybody sees, flatter nobody.
Dimensions: N layers with LRSA, H key-value heads, T tokens, K of L tokens kept of a partition, n tokens that count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.analysis.record import Sample, SelectionRecord, check_comparable

Evidence = Literal["gold", "answer"]

KINDS = ("number", "name", "rare", "punctuation", "space", "other")

# A word, and what stands before it where a sentence or a line opens with it.
_WORD = re.compile(r"""(?P<opening>(?:\A|[.!?:\n])[\s"'“(]*)?(?P<word>\w+)""")


@dataclass(frozen=True, eq=False)
class Survival:
    """Which share of some tokens was kept; NaN where none of them lies in a compressed partition.

    Attributes:
        tokens: n, how many tokens were asked about, over all samples.
        by_head: (N, H), kept by a head of a layer.
        by_layer_any: (N,), kept by at least one head of a layer.
        anywhere: kept by at least one head of any layer.
        chance: K/L, which a head that chooses at random reaches.
    """

    tokens: int
    by_head: NDArray[np.float64]
    by_layer_any: NDArray[np.float64]
    anywhere: float
    chance: float

    @property
    def by_layer(self) -> NDArray[np.float64]:
        """(N,), mean over the heads of a layer."""
        means: NDArray[np.float64] = self.by_head.mean(axis=1)
        return means

    @property
    def mean(self) -> float:
        """Mean over all layers and heads."""
        return float(self.by_head.mean())

    @property
    def chance_layer_any(self) -> float:
        """1 - (1 - K/L)^H, what the heads of a layer reach together if each chooses at random."""
        return float(1 - (1 - self.chance) ** self.by_head.shape[1])

    @property
    def chance_anywhere(self) -> float:
        """1 - (1 - K/L)^(N H), what all heads reach together if each chooses at random."""
        return float(1 - (1 - self.chance) ** self.by_head.size)


@dataclass(frozen=True, eq=False)
class Agreement:
    """How alike some heads choose, pair by pair.

    Attributes:
        jaccard: size of the intersection over that of the union; NaN for two empty choices.
        kappa: Cohen's kappa over the n tokens: 1 equal, 0 what chance gives to heads that keep so many; NaN where that
            is certain, because both keep all or nothing.
    """

    jaccard: NDArray[np.float64]
    kappa: NDArray[np.float64]


@dataclass(frozen=True)
class KindShare:
    """How many tokens of a kind lie in compressed partitions, and their share of the tokens there and of those kept."""

    kind: str
    tokens: int
    of_all: float
    of_kept: float


def survival(record: SelectionRecord, evidence: Evidence) -> Survival:
    """What became of the gold passages' or the answers' tokens, pooled over the samples.

    Args:
        record: the selections.
        evidence: ``"gold"`` for the supporting passages, ``"answer"`` for the answers within them.
    """
    layers, heads = record.samples[0].positions.shape[:2]
    by_head, by_layer, anywhere, total = np.zeros((layers, heads)), np.zeros(layers), 0, 0
    for sample in record.samples:
        kept = record.kept(sample)[:, :, of_evidence(sample, evidence)[record.compressed(sample)]]
        by_head += kept.sum(axis=2)
        by_layer += kept.any(axis=1).sum(axis=1)
        anywhere += int(kept.any(axis=(0, 1)).sum())
        total += kept.shape[2]
    count = total or np.nan
    return Survival(total, by_head / count, by_layer / count, anywhere / count, record.top_k / record.lag_size)


def by_place(record: SelectionRecord, parts: int) -> NDArray[np.float64]:
    """Which share of each stretch of a partition was kept, pooled over the samples' partitions and the heads.

    The score is of rotated keys: one that changes along the partition tells of the place, and not of the token alone.

    Args:
        record: the selections.
        parts: into how many stretches a partition is cut; places i with equal floor(i parts / L) are one.

    Returns:
        (N, parts), from the first to the last tokens; NaN where nothing was compressed, or a stretch has no token.
    """
    lag = record.lag_size
    kept, total = np.zeros((len(record.layers), lag)), 0
    for sample in record.samples:
        partitions = record.kept(sample).reshape(*sample.positions.shape[:3], lag)
        kept += partitions.sum(axis=(1, 2))
        total += partitions.shape[1] * partitions.shape[2]
    member = np.arange(lag) * parts // lag == np.arange(parts)[:, None]
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = (kept @ member.T) / (member.sum(axis=1) * total)
    return shares


def agreement(record: SelectionRecord) -> Agreement:
    """Every head of every layer against every other: matrices (N H, N H), heads of a layer side by side."""
    kept = np.concatenate([record.kept(sample) for sample in record.samples], axis=2)
    flat = kept.reshape(kept.shape[0] * kept.shape[1], kept.shape[2]).astype(np.float64)
    sizes = flat.sum(axis=1)
    return _agreement(flat @ flat.T, sizes[:, None], sizes[None, :], flat.shape[1])


def agreement_between(first: SelectionRecord, second: SelectionRecord) -> Agreement:
    """Each head (N, H) with itself in another record: other weights, or another rule.

    Under two rules only tokens count that lie in compressed partitions of both.

    Raises:
        UserError: records of other models or other samples.
    """
    check_comparable(first, second)
    pairs = []
    for one, other in zip(first.samples, second.samples, strict=True):
        regions = first.compressed(one), second.compressed(other)
        start, stop = max(r.start for r in regions), min(r.stop for r in regions)
        cut = [slice(start - region.start, max(stop, start) - region.start) for region in regions]
        pairs.append((first.kept(one)[:, :, cut[0]], second.kept(other)[:, :, cut[1]]))
    before, after = (np.concatenate(parts, axis=2) for parts in zip(*pairs, strict=True))
    both = (before & after).sum(axis=2).astype(np.float64)
    return _agreement(both, before.sum(axis=2), after.sum(axis=2), before.shape[2])


def between_layers(matrix: NDArray[np.float64], heads: int) -> NDArray[np.float64]:
    """Means over pairs of heads of a matrix of :class:`Agreement` (N H, N H): (N, N).

    The diagonal is the mean over pairs of different heads of one layer, NaN where a layer has one head only.
    """
    layers = matrix.shape[0] // heads
    blocks = matrix.reshape(layers, heads, layers, heads).swapaxes(1, 2).copy()
    blocks[np.arange(layers)[:, None], np.arange(layers)[:, None], np.arange(heads), np.arange(heads)] = np.nan
    present = ~np.isnan(blocks)
    count = present.sum(axis=(2, 3))
    total = np.where(present, blocks, 0).sum(axis=(2, 3))
    means: NDArray[np.float64] = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return means


def kinds_kept(record: SelectionRecord) -> list[KindShare]:
    """How each kind of tokens fares, in the order of :data:`KINDS`, pooled over samples, layers and heads."""
    tokens, kept_tokens = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    total = kept_total = 0
    for sample in record.samples:
        region = record.compressed(sample)
        votes = record.kept(sample).sum(axis=(0, 1))  # heads that kept each token
        member = np.stack([flags[region] for flags in token_kinds(record.tokens(sample)).values()])
        tokens += member.sum(axis=1)
        kept_tokens += member @ votes
        total += len(votes)
        kept_total += int(votes.sum())
    of_all, of_kept = tokens / (total or np.nan), kept_tokens / (kept_total or np.nan)
    return [KindShare(kind, int(tokens[i]), float(of_all[i]), float(of_kept[i])) for i, kind in enumerate(KINDS)]


def token_kinds(texts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The kinds of each token, judged by the word that it belongs to; a token may be of several.

    A *number* has a digit. A *name* starts with a capital, and not only because a sentence or line starts there. A
    *rare* word stands once in the text, whatever its case. *Punctuation* belongs to no word, *space* shows nothing, and
    what is none of all that is *other*.

    Args:
        texts: the text of each token (T); joined they are the whole text.

    Returns:
        For each of :data:`KINDS` a flag for each token, (T,) bool.
    """
    words = list(_WORD.finditer("".join(texts)))
    times = Counter(word["word"].casefold() for word in words)
    kinds = {kind: np.zeros(len(texts), dtype=bool) for kind in KINDS}
    for index, word in enumerate(_word_of_each(texts, words)):
        if word is None:
            kinds["punctuation" if texts[index].strip() else "space"][index] = True
            continue
        kinds["number"][index] = any(letter.isdigit() for letter in word["word"])
        kinds["name"][index] = word["word"][0].isupper() and word["opening"] is None
        kinds["rare"][index] = times[word["word"].casefold()] == 1
    named = np.any([flags for kind, flags in kinds.items() if kind != "other"], axis=0)
    return {**kinds, "other": ~named}


def of_evidence(sample: Sample, evidence: Evidence) -> NDArray[np.bool_]:
    """Which tokens (T,) belong to the evidence; overlapping spans count once."""
    member = np.zeros(sample.length, dtype=bool)
    for start, end in sample.gold_spans if evidence == "gold" else sample.answer_spans:
        member[start:end] = True
    return member


def _word_of_each(texts: Sequence[str], words: Sequence[re.Match[str]]) -> Iterator[re.Match[str] | None]:
    """For each token the first word that it overlaps, or None."""
    start = current = 0
    for text in texts:
        while current < len(words) and words[current].end("word") <= start:
            current += 1
        overlaps = current < len(words) and words[current].start("word") < start + len(text)
        yield words[current] if overlaps else None
        start += len(text)


def _agreement(
    both: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64], count: int
) -> Agreement:
    """Jaccard and Cohen's kappa from the numbers kept by both, by the first, by the second, of ``count`` tokens."""
    either = first + second - both
    jaccard = np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0)
    # observed - expected and 1 - expected agreement, both times count ** 2, in integers that float64 holds exactly.
    above_chance = 2 * (count * both - first * second)
    possible = count * (first + second) - 2 * first * second
    kappa = np.divide(above_chance, possible, out=np.full(both.shape, np.nan), where=possible > 0)
    return Agreement(jaccard, kappa)
