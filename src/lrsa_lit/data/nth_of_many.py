"""Repeating the n-th of several texts written for the same request: like OpenAI's MRCR.

Sources: Vodrahalli et al., "Michelangelo: Long Context Evaluations Beyond Haystacks via Latent Structure Queries",
arXiv 2409.12640 (multi-round co-reference resolution); OpenAI's MRCR data set (a random prefix, and the score). Texts
come from this project's templates instead of a model, and the conversation is a text within one message, so scores are
not comparable with published ones.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lrsa_lit.data.haystack import interleave
from lrsa_lit.data.module import QADataModule, Split, at_least
from lrsa_lit.data.prompts import Example, Prompt, TooLong
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.requests import KINDS, TOPICS, request, text
from lrsa_lit.data.sized import largest
from lrsa_lit.errors import UserError

PROMPT = Prompt(
    "What follows is a conversation between a user and an assistant. Afterwards I will ask you to repeat one of the "
    "assistant's texts.\n\n{context}{input}",
    heading=None,
)
_PREFIX = 10


class NthOfMany(QADataModule):
    """A conversation that repeats one request, each time with another text; one of the texts is asked for.

    As many other exchanges as fit into ``max_tokens`` ask for another kind of text or another topic. The answer must
    begin with a random prefix; the score is how much of the text follows it
    (:func:`~lrsa_lit.evaluation.answer_scores.verbatim_score`, reported as ``f1``).

    Args:
        of: how often the request occurs; several numbers are possible. Examples alternate between them, and each is
            scored separately, as "of-4".
        train: number of training examples.
        val: number of validation examples.
        test: number of test examples.
        kwargs: see QADataModule.
    """

    def __init__(
        self, of: Sequence[int] = (2, 4, 8), train: int = 1000, val: int = 90, test: int = 300, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not of or len(set(of)) < len(of):
            raise UserError("of", list(of), "a list of different numbers")
        self.of = [at_least("of", count, 2) for count in of]
        self.train = at_least("train", train, 1)
        self.val = at_least("val", val, 1)
        self.test = at_least("test", test, 1)

    def records(self, split: Split) -> Sequence[QARecord]:
        """The questions of a split, with only the texts of the repeated request; ids such as "test-of-4-1"."""
        asked = [(number, self.of[number % len(self.of)]) for number in range(getattr(self, split))]
        return [self._record(f"{split}-of-{count}-{number}", count)[0] for number, count in asked]

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example with these exchanges, in order, among as many others as fit; ``seed`` and the id decide them."""
        _, target = self._record(record.id, len(record.passages))

        def grown(size: int) -> QARecord:
            others = list(itertools.islice(self._others(record.id, target), size))
            places = random.Random(f"{self.seed}:{record.id}:places")
            return replace(record, passages=interleave(record.passages, others, places))

        return self.encode(*largest(grown, 1, PROMPT, self.checked_tokenizer, self.max_tokens), PROMPT)

    def _record(self, name: str, count: int) -> tuple[QARecord, tuple[str, str]]:
        """The record, and the kind and topic of the text that it asks for."""
        rng = random.Random(f"{self.seed}:{name}")
        kind, topic = target = rng.choice(KINDS), rng.choice(TOPICS)
        texts: dict[str, None] = {}
        while len(texts) < count:
            texts[text(*target, rng)] = None
        wanted = rng.randrange(count)
        prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=_PREFIX))
        record = QARecord(
            id=name,
            passages=tuple(_exchange(*target, found, f"Text {place}") for place, found in enumerate(texts, start=1)),
            question=f"Write {prefix} and, behind a blank, repeat the {_ordinal(wanted + 1)} {kind} about {topic} of "
            "the conversation above, word for word. Do not write anything else.",
            answers=(f"{prefix} {list(texts)[wanted]}",),
            supporting_titles=(f"Text {wanted + 1}",),
            match="verbatim",
            task=f"of-{count}",
        )
        return record, target

    def _others(self, name: str, target: tuple[str, str]) -> Iterator[Passage]:
        rng = random.Random(f"{self.seed}:{name}:others")
        while True:
            other = rng.choice(KINDS), rng.choice(TOPICS)
            if other != target:
                yield _exchange(*other, text(*other, rng))


def _exchange(kind: str, topic: str, found: str, title: str = "") -> Passage:
    return Passage(title, f"User: {request(kind, topic)}\nAssistant: {found}\n\n")


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
