"""Contexts split into sentences, some of which support a question: batches, and positive and negative sampling."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from torch import Tensor

from lrsa_lit.models.sentence_encoder import joined

_OF_SENTENCES = ("sentences", "keys", "paragraphs", "lengths", "bm25")


@dataclass(frozen=True)
class Facts:
    """A question and its context, sentence by sentence.

    Attributes:
        id: id of the question.
        question: token ids of the question.
        sentences: token ids of each sentence of the context; a paragraph's first sentence starts with its title.
        keys: identifies each sentence; the same sentence of the same paragraph has the same key in other contexts.
        paragraphs: index of each sentence's paragraph.
        lengths: number of tokens of each sentence, without the title.
        titles: number of tokens of each paragraph's title.
        supporting: indices of the sentences that the answer follows from, ascending.
        bm25: BM25 score of each sentence together with its title.
    """

    id: str
    question: list[int]
    sentences: list[list[int]]
    keys: list[tuple[str, str]]
    paragraphs: list[int]
    lengths: list[int]
    titles: list[int]
    supporting: list[int]
    bm25: list[float]


class FactsBatch(TypedDict):
    """A batch of contexts.

    Attributes:
        facts: the question and context of each row.
        input_ids: (B, T) int64, the sentences of each context, padded on the right.
        mask: (B, T) int64, 1 on tokens and 0 on pads.
        segments: (B, T) int64, index of each token's sentence, -1 on pads.
        question_ids: (B, Tq) int64, padded on the right.
        question_mask: (B, Tq) int64.
        question_segments: (B, Tq) int64, 0 on tokens and -1 on pads.
        position: position of each row in its split.
        repeated: whether a row only fills up this device's share, because another device already counts it.
    """

    facts: list[Facts]
    input_ids: Tensor
    mask: Tensor
    segments: Tensor
    question_ids: Tensor
    question_mask: Tensor
    question_segments: Tensor
    position: list[int]
    repeated: list[bool]


def draw(facts: Facts, negatives: int, rng: random.Random) -> tuple[int, list[int]]:
    """Draw a supporting sentence (positive) and non-supporting sentences with lower BM25 scores (negatives).

    Half of the negatives come from paragraphs with a supporting sentence. If too few sentences have lower scores, the
    lowest-ranked non-supporting sentences are used.

    Args:
        facts: must have a supporting and a non-supporting sentence.
        negatives: number of negatives; sentences repeat if there are too few.
        rng: random generator.

    Returns:
        The index of the positive, and the indices of the negatives.
    """
    positive = rng.choice(facts.supporting)
    others = [number for number in range(len(facts.sentences)) if number not in facts.supporting]
    below = [number for number in others if facts.bm25[number] < facts.bm25[positive]]
    gold = {facts.paragraphs[number] for number in facts.supporting}
    groups = [[number for number in below if (facts.paragraphs[number] in gold) == hard] for hard in (True, False)]
    lowest = sorted(others, key=lambda number: facts.bm25[number])
    drawn: list[int] = []
    for place in range(negatives):
        for pool in (groups[place % 2], groups[1 - place % 2], lowest):
            if left := [number for number in pool if number not in drawn]:
                drawn.append(left[0] if pool is lowest else rng.choice(left))
                break
        else:
            drawn.append(rng.choice(others))
    return positive, drawn


def supports_too(facts: Sequence[Facts], candidates: Sequence[tuple[int, int]]) -> list[list[bool]]:
    """For each question and candidate: whether it supports the question without being its positive.

    Args:
        facts: the facts of B questions.
        candidates: (row, sentence) of each candidate; the first B are the positives of the questions.
    """
    keys = [facts[row].keys[number] for row, number in candidates]
    gold = [{each.keys[number] for number in each.supporting} for each in facts]
    return [[key in own and j != i for j, key in enumerate(keys)] for i, own in enumerate(gold)]


def cut(facts: Facts, most: int) -> Facts:
    """Remove non-supporting paragraphs, the last ones first, until at most ``most`` tokens are left.

    If the supporting paragraphs alone exceed ``most``, the result has no sentences.
    """
    gold = {facts.paragraphs[number] for number in facts.supporting}
    tokens = sum(map(len, facts.sentences))
    gone: set[int] = set()
    for paragraph in reversed(dict.fromkeys(facts.paragraphs)):
        if tokens > most and paragraph not in gold:
            gone.add(paragraph)
            own = zip(facts.sentences, facts.paragraphs, strict=True)
            tokens -= sum(len(ids) for ids, place in own if place == paragraph)
    if tokens > most:
        return replace(facts, sentences=[])
    left = [number for number, place in enumerate(facts.paragraphs) if place not in gone]
    lists: dict[str, Any] = {name: [getattr(facts, name)[number] for number in left] for name in _OF_SENTENCES}
    return replace(facts, **lists, supporting=[left.index(number) for number in facts.supporting])


def collate_facts(rows: Sequence[dict[str, Any]]) -> FactsBatch:
    """A batch of rows with ``facts``, ``position`` and ``repeated``."""
    facts = [row["facts"] for row in rows]
    ids, mask, segments = joined([each.sentences for each in facts])
    question_ids, question_mask, question_segments = joined([[each.question] for each in facts])
    return FactsBatch(
        facts=facts,
        input_ids=ids,
        mask=mask,
        segments=segments,
        question_ids=question_ids,
        question_mask=question_mask,
        question_segments=question_segments,
        position=[row["position"] for row in rows],
        repeated=[row["repeated"] for row in rows],
    )
