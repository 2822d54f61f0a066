"""What selections are worth: does the evidence survive, do layers agree, which tokens are kept.

Only tokens in compressed partitions count, so that the sinks and the raw window, which everybody sees, flatter nobody.
Dimensions: N layers with LRSA, H key-value heads, T tokens, K of L tokens kept of a partition, n tokens that count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.analysis.record import Sample, SelectionRecord, check_comparable

Evidence = Literal["gold", "answer"]

KINDS = ("number", "name", "rare", "punctuation", "space", "other")

# A word, and what stands before it where a sentence or a line opens with it.
_WORD = re.compile(r"""(?P<opening>(?:\A|[.!?:\n])[\s"'“(]*)?(?P<word>\w+)""")


class Survival(NamedTuple):
    """Which share of some tokens was kept; NaN where none of them lies in a compressed partition.

    Attributes:
        tokens: n, how many tokens were asked about, over all samples.
        by_head: (N, H), kept by a head of a layer.
        mean: of all layers and heads.
        anywhere: kept by at least one head of any layer.
        chance: K/L, which a head that chooses at random reaches.
        chance_anywhere: 1 - (1 - K/L)^(N H), what all heads reach together if each chooses at random.
    """

    tokens: int
    by_head: NDArray[np.float64]
    mean: float
    anywhere: float
    chance: float
    chance_anywhere: float


def survival(record: SelectionRecord, evidence: Evidence) -> Survival:
    """What became of the tokens of supporting passages (``"gold"``) or of the answers within them (``"answer"``)."""
    asked = [of_evidence(sample, evidence)[record.compressed(sample)] for sample in record.samples]
    kept = record.all_kept()[:, :, np.concatenate(asked)]
    tokens = kept.shape[2]
    by_head, anywhere = kept.sum(axis=2) / (tokens or np.nan), kept.any(axis=(0, 1)).sum() / (tokens or np.nan)
    by_chance = 1 - (1 - record.chance) ** by_head.size
    return Survival(tokens, by_head, float(by_head.mean()), float(anywhere), record.chance, by_chance)


def by_place(record: SelectionRecord, parts: int) -> NDArray[np.float64]:
    """Which share of each stretch of a partition was kept, pooled over the samples' partitions and the heads.

    The score is of rotated keys: one that changes along the partition tells of the place, and not of the token alone.
    Places i with equal floor(i parts / L) are one of the ``parts`` stretches.

    Returns:
        (N, parts), from the first to the last tokens; NaN where nothing was compressed, or a stretch has no token.
    """
    lag, kept = record.rule["lag_size"], record.all_kept()
    partitions = kept.reshape(*kept.shape[:2], -1, lag)
    member = np.arange(lag) * parts // lag == np.arange(parts)[:, None]
    total = member.sum(axis=1) * partitions.shape[1] * partitions.shape[2]
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = partitions.sum(axis=(1, 2)) @ member.T / total
    return shares


def agreement(record: SelectionRecord) -> NDArray[np.float64]:
    """Cohen's kappa between the heads of each two layers (N, N), mean over their pairs; the diagonal is of other heads.

    It is 1 for equal choices, 0 for what chance gives to heads that keep so many, and NaN where both keep all or both
    nothing, so that equal choices are certain, and where a layer has one head only.
    """
    kept = record.all_kept()
    layers, heads, tokens = kept.shape
    flat = kept.reshape(layers * heads, tokens).astype(np.float64)
    sizes = flat.sum(axis=1)
    kappa = _kappa(flat @ flat.T, sizes[:, None], sizes[None, :], tokens)
    np.fill_diagonal(kappa, np.nan)
    blocks = np.ma.masked_invalid(kappa).reshape(layers, heads, layers, heads)
    means: NDArray[np.float64] = blocks.mean(axis=(1, 3)).filled(np.nan)
    return means


def agreement_between(first: SelectionRecord, second: SelectionRecord) -> NDArray[np.float64]:
    """Cohen's kappa of each head (N, H) with itself in another record: other weights, or another rule.

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
    return _kappa((before & after).sum(axis=2), before.sum(axis=2), after.sum(axis=2), before.shape[2])


def kinds_kept(record: SelectionRecord) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The shares of each of :data:`KINDS` of all tokens, and of those kept, pooled over samples, layers and heads."""
    votes = record.all_kept().sum(axis=(0, 1))  # heads that kept each token
    flags = [
        np.stack([*token_kinds(record.tokens(sample)).values()])[:, record.compressed(sample)]
        for sample in record.samples
    ]
    member = np.concatenate(flags, axis=1)
    return member.sum(axis=1) / (len(votes) or np.nan), member @ votes / (votes.sum() or np.nan)


def token_kinds(texts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The kinds of each token, judged by the word that it belongs to; a token may be of several.

    A *number* has a digit. A *name* starts with a capital, and not only because a sentence or line starts there. A
    *rare* word stands once in the text, whatever its case. *Punctuation* belongs to no word, *space* shows nothing, and
    what is none of all that is *other*.

    Args:
        texts: of each token (T); joined they are the whole text.

    Returns:
        (T,) bool for each of :data:`KINDS`.
    """
    text = "".join(texts)
    word_at: list[re.Match[str] | None] = [None] * len(text)
    times: Counter[str] = Counter()
    for word in _WORD.finditer(text):
        word_at[slice(*word.span("word"))] = [word] * len(word["word"])
        times[word["word"].casefold()] += 1
    kinds = {kind: np.zeros(len(texts), dtype=bool) for kind in KINDS}
    start = 0
    for index, token in enumerate(texts):
        first = next(filter(None, word_at[start : start + len(token)]), None)
        start += len(token)
        if first is None:
            kinds["punctuation" if token.strip() else "space"][index] = True
            continue
        kinds["number"][index] = any(letter.isdigit() for letter in first["word"])
        kinds["name"][index] = first["word"][0].isupper() and first["opening"] is None
        kinds["rare"][index] = times[first["word"].casefold()] == 1
    named = np.any([flags for kind, flags in kinds.items() if kind != "other"], axis=0)
    return {**kinds, "other": ~named}


def of_evidence(sample: Sample, evidence: Evidence) -> NDArray[np.bool_]:
    """Which tokens (T,) belong to the evidence; overlapping spans count once."""
    member = np.zeros(len(sample.token_ids), dtype=bool)
    for start, end in sample.gold_spans if evidence == "gold" else sample.answer_spans:
        member[start:end] = True
    return member


def _kappa(both: NDArray[Any], first: NDArray[Any], second: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Cohen's kappa from the numbers kept by both, by the first, by the second, of ``count`` tokens."""
    # observed - expected and 1 - expected agreement, both times count ** 2, in integers that float64 holds exactly.
    above_chance = 2 * (count * both - first * second)
    possible = count * (first + second) - 2 * first * second
    kappa: NDArray[np.float64] = np.full(both.shape, np.nan)
    np.divide(above_chance, possible, out=kappa, where=possible > 0)
    return kappa
