"""Contexts as sentences of which some support a question: batches of them, and sentences drawn to be told apart."""

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
        id: of the question.
        question: its token ids.
        sentences: token ids of each sentence of the context, the first one of a paragraph behind its title.
        keys: the same for the same sentence of the same paragraph in another context.
        paragraphs: the paragraph of each sentence.
        lengths: tokens of each sentence without the title.
        titles: tokens of each paragraph's title.
        supporting: the sentences that the answer follows from, ascending.
        bm25: the score of each sentence, its title before it.
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
    """Several contexts.

    Attributes:
        facts: one for each row.
        input_ids: (B, T) int64, the sentences of each, padded on the right.
        mask: (B, T) int64, 1 on tokens and 0 on pads.
        segments: (B, T) int64, the sentence of each token, -1 on pads.
        question_ids: (B, Tq) int64, padded on the right.
        question_mask: (B, Tq) int64.
        question_segments: (B, Tq) int64, 0 on tokens and -1 on pads.
        position: of each in its split.
        repeated: whether a row only fills up this device's share; it counts on another device already.
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
    """A sentence that supports the question, and others of the context that do not and rank below it by BM25.

    Half of the others come from paragraphs with a supporting sentence. Where too few rank below it, the lowest ones of
    all that do not support the question take their place.

    Args:
        facts: with a supporting sentence and one that is not.
        negatives: how many; one may come several times if there are fewer.
        rng: draws.
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
    """Of each question and candidate, whether it supports the question without being that question's positive.

    Args:
        facts: of B questions.
        candidates: the row and sentence of each; the first B are the positives.
    """
    keys = [facts[row].keys[number] for row, number in candidates]
    gold = [{each.keys[number] for number in each.supporting} for each in facts]
    return [[key in own and j != i for j, key in enumerate(keys)] for i, own in enumerate(gold)]


def cut(facts: Facts, most: int) -> Facts:
    """The same without the last paragraphs that support nothing, as many as it takes to have so many tokens."""
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
