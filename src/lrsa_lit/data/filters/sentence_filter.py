"""Filters that keep whole sentences: the highest-ranked ones within a token budget.

There are two selection rules: that of CPC (Liskavets et al., "Prompt Compression with Context-Aware Sentence Encoding
for Fast and Improved LLM Inference", arXiv 2409.01227), and a strict rule of this project that never exceeds the
budget.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from lrsa_lit.bounds import check_setting
from lrsa_lit.data.filters.context_filter import Budgeted, with_texts
from lrsa_lit.data.filters.sentences import Sentence, pieces_of, sentences_of
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.tokenization import token_counts
from lrsa_lit.errors import UserError

SelectionRule: TypeAlias = Literal["strict", "published"]


@dataclass(frozen=True)
class SentenceFilter(Budgeted):
    """Keep the sentences with the highest scores, in their original order, under the titles of their passages.

    Sentences longer than the budget are cut into pieces that are ranked separately.

    Args:
        rule: "strict" skips sentences that do not fit and never exceeds the budget. "published" is CPC's rule: it stops
            after the sentence that exceeds the budget, and counts one token between two sentences.
        forced: a regular expression; sentences that match it are ranked before all others.
    """

    rule: Literal["strict", "published"] = field(default="strict", kw_only=True)
    forced: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_setting("rule", self.rule, self.rule in ("strict", "published"), "strict or published")
        try:
            re.compile(self.forced or "")
        except (re.error, TypeError) as error:
            raise UserError("forced", self.forced, "a regular expression", reason=f"is invalid ({error})") from None

    @abstractmethod
    def scores(self, record: QARecord, sentences: Sequence[Sentence]) -> Sequence[float]:
        """Return the score of each sentence of a record's context, in order; ties go to the earlier sentence."""

    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        """The kept sentences of each passage, joined."""
        return self.parted(record, prompt)[0]

    def parted(self, record: QARecord, prompt: Prompt) -> tuple[Sequence[str], Sequence[Sentence], Sequence[bool]]:
        """As in :class:`ContextFilter`, with pieces of long sentences counted as sentences."""
        total = self.count(record.passages, prompt)
        if (budget := self.budget(total, record, prompt)) >= total:
            sentences = sentences_of(record.passages)
            return [passage.text for passage in record.passages], sentences, [True] * len(sentences)
        titles = self.title_tokens(record.passages, prompt)
        sentences, lengths = self._cut(record, budget, titles)
        forced = [self.forced is not None and bool(re.search(self.forced, each.text)) for each in sentences]
        order = ranked(self.scores(record, sentences), forced)
        places = [each.passage for each in sentences]
        taken = selected(order, lengths, budget, self.rule, places, titles)
        while True:
            left = _joined(sentences, taken, len(record.passages))
            # Joining sentences may change the tokenisation and add tokens.
            if self.rule == "published" or self.count(with_texts(record.passages, left), prompt) <= budget or not taken:
                return left, sentences, [place in taken for place in range(len(sentences))]
            taken.pop()

    def _cut(self, record: QARecord, budget: int, titles: Sequence[int]) -> tuple[list[Sentence], list[int]]:
        """The sentences of a context, long ones in pieces, and the token count of each."""
        found: list[Sentence] = []
        lengths: list[int] = []
        whole = sentences_of(record.passages)
        for sentence, tokens in zip(whole, token_counts(self.tokenizer, [each.text for each in whole]), strict=True):
            room = max(budget - titles[sentence.passage], 1)
            if tokens <= room:
                found.append(sentence)
                lengths.append(tokens)
                continue
            parts = list(pieces_of(sentence.text, self.tokenizer, room))
            found += (replace(sentence, text=text, first=sentence.first and not n) for n, text in enumerate(parts))
            lengths += token_counts(self.tokenizer, parts)
        return found, lengths


def ranked(scores: Sequence[float], forced: Sequence[bool]) -> list[int]:
    """The positions of the sentences, highest score first; forced sentences come before the others."""
    return sorted(range(len(scores)), key=lambda place: (not forced[place], -scores[place], place))


def selected(
    order: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    rule: SelectionRule,
    places: Sequence[int] | None = None,
    titles: Sequence[int] = (),
) -> list[int]:
    """Select sentences within a token budget, and return them in the order of selection.

    Args:
        order: positions of the sentences, best first.
        lengths: tokens of each sentence.
        budget: the token budget, which the strict rule never exceeds.
        rule: see :class:`SentenceFilter`.
        places: the passage of each sentence; None if passages have no titles.
        titles: tokens of each passage's title, added when its first sentence is selected.
    """
    shown: set[int] = set()
    kept: list[int] = []
    taken = 0 if rule == "strict" else -1
    for position in order:
        place = None if places is None else places[position]
        cost = lengths[position] + (0 if place is None or place in shown else titles[place])
        if rule == "strict" and taken + cost > budget:
            continue
        kept.append(position)
        taken += cost if rule == "strict" else cost + 1
        if place is not None:
            shown.add(place)
        if rule == "published" and taken > budget:
            break
    return kept


def _joined(sentences: Sequence[Sentence], kept: Sequence[int], passages: int) -> list[str]:
    texts = [""] * passages
    for position in sorted(kept):
        texts[sentences[position].passage] += sentences[position].text
    return texts
