"""Metrics of selections: whether the evidence is kept, whether layers agree, and which tokens are kept.

Only tokens in compressed partitions count. Sinks and the raw window are left out, because every head sees them.

Dimensions: N layers with LRSA, H key-value heads, T tokens, K of L tokens kept per partition, n tokens that count.
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

# A word, preceded by its ``opening`` if it starts a sentence or line.
_WORD = re.compile(r"""(?P<opening>(?:\A|[.!?:\n])[\s"'“(]*)?(?P<word>\w+)""")


class Survival(NamedTuple):
    """The kept share of some tokens; NaN if none of them is in a compressed partition.

    Attributes:
        tokens: n, the number of these tokens in compressed partitions, over all samples.
        by_head: (N, H), the share kept by each head of each layer.
        mean: mean over all layers and heads.
        anywhere: share kept by at least one head of any layer.
        chance: K/L, the expected share of a head with random selection.
        chance_anywhere: 1 - (1 - K/L)^(N H), the expected share of ``anywhere`` if every head selects at random.
    """

    tokens: int
    by_head: NDArray[np.float64]
    mean: float
    anywhere: float
    chance: float
    chance_anywhere: float


def survival(record: SelectionRecord, evidence: Evidence) -> Survival:
    """The kept share of the tokens of supporting passages (``"gold"``) or of the answers in them (``"answer"``)."""
    asked = [of_evidence(sample, evidence)[record.compressed(sample)] for sample in record.samples]
    kept = record.all_kept()[:, :, np.concatenate(asked)]
    tokens = kept.shape[2]
    by_head, anywhere = kept.sum(axis=2) / (tokens or np.nan), kept.any(axis=(0, 1)).sum() / (tokens or np.nan)
    by_chance = 1 - (1 - record.chance) ** by_head.size
    return Survival(tokens, by_head, float(by_head.mean()), float(anywhere), record.chance, by_chance)


def by_place(record: SelectionRecord, parts: int) -> NDArray[np.float64]:
    """The kept share of each section of a partition, pooled over the samples' partitions and the heads.

    Scores are computed from rotated keys, so a share that changes along the partition shows an effect of position. The
    places i with equal floor(i parts / L) form one of the ``parts`` sections.

    Returns:
        (N, parts), from the first to the last tokens; NaN if nothing was compressed or a section has no token.
    """
    lag, kept = record.rule["lag_size"], record.all_kept()
    partitions = kept.reshape(*kept.shape[:2], -1, lag)
    member = np.arange(lag) * parts // lag == np.arange(parts)[:, None]
    total = member.sum(axis=1) * partitions.shape[1] * partitions.shape[2]
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float64] = partitions.sum(axis=(1, 2)) @ member.T / total
    return shares


def agreement(record: SelectionRecord) -> NDArray[np.float64]:
    """Cohen's kappa between the heads of each pair of layers (N, N), averaged over pairs of heads.

    The diagonal compares different heads of one layer. Kappa is 1 for equal selections and 0 for the agreement expected
    by chance. It is NaN if both heads keep everything or both keep nothing, and on the diagonal of layers with one
    head.
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
    """Cohen's kappa of each head (N, H) between two records: with other weights, or another rule.

    Only tokens that are in compressed partitions of both records count.

    Raises:
        UserError: the records have different models or samples.
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
    """The share of each of :data:`KINDS` among all tokens and among kept ones, over all samples, layers and heads."""
    votes = record.all_kept().sum(axis=(0, 1))  # heads that kept each token
    flags = [
        np.stack([*token_kinds(record.tokens(sample)).values()])[:, record.compressed(sample)]
        for sample in record.samples
    ]
    member = np.concatenate(flags, axis=1)
    return member.sum(axis=1) / (len(votes) or np.nan), member @ votes / (votes.sum() or np.nan)


def token_kinds(texts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """The kinds of each token, decided by the word that it belongs to; a token may have several kinds.

    A *number* contains a digit. A *name* starts with a capital letter and does not start a sentence or line. A *rare*
    word occurs once in the text, ignoring case. *Punctuation* belongs to no word, *space* is only white space, and all
    remaining tokens are *other*.

    Args:
        texts: the text of each token (T); joined, they give the whole text.

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
    """Cohen's kappa, from the numbers of tokens kept by both, by the first and by the second, of ``count`` tokens."""
    # (observed - expected) and (1 - expected) agreement, times count ** 2: integers that float64 represents exactly.
    above_chance = 2 * (count * both - first * second)
    possible = count * (first + second) - 2 * first * second
    kappa: NDArray[np.float64] = np.full(both.shape, np.nan)
    np.divide(above_chance, possible, out=kappa, where=possible > 0)
    return kappa
