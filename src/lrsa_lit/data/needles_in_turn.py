"""Needles asked for one after another: several keys in one haystack, one per turn of a conversation.

Based on RULER's ``niah_multikey`` (see :mod:`~lrsa_lit.data.needle`). When the haystack is compressed, it is not known
which key will be asked for, and all keys are asked for in turn. The conversation is this project's addition.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrsa_lit.data.module import Split, at_least
from lrsa_lit.data.needle import Needles
from lrsa_lit.data.needle_tasks import magic_numbers
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.records import Passage, QARecord, asked_in_turn


class NeedlesInTurn(Needles):
    """Conversations about several needles in a haystack; each turn is an example, scored separately by turn number.

    Earlier turns have the reference answers (:func:`~lrsa_lit.data.records.asked_in_turn`). All turns of a conversation
    have the same context, which fills ``max_tokens`` in the last turn.

    Args:
        turns: number of keys per haystack, all of which are asked for; at least 2.
        train: number of training examples, which make ``train / turns`` conversations.
        val: number of validation examples.
        test: number of test examples.
        kwargs: source and sha256 (of the haystack); further arguments of QADataModule.
    """

    def __init__(self, turns: int = 4, train: int = 1000, val: int = 100, test: int = 400, **kwargs: Any) -> None:
        super().__init__(tasks=["niah_multikey"], train=train, val=val, test=test, **kwargs)
        self.turns = at_least("turns", turns, 2)
        self._last: tuple[str, tuple[Passage, ...]] = "", ()

    def records(self, split: Split) -> Sequence[QARecord]:
        """The turns of all conversations, with only the needles as passages; ids such as "test-0-turn-1"."""
        count = getattr(self, split)
        numbers = range(-(-count // self.turns))
        return [record for number in numbers for record in self._conversation(f"{split}-{number}")][:count]

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example with the needles at random depths of a haystack, equal for all turns of a conversation."""
        name = record.id.partition("-turn-")[0]
        if self._last[0] != name:
            rng = random.Random(f"{self.seed}:{name}:haystack")
            longest = self._conversation(name)[-1]
            full, _ = self._pool.fill(longest, lambda _: True, rng, self.checked_tokenizer, self.max_tokens)
            self._last = name, full.passages
        return self.encode(replace(record, passages=self._last[1]))

    def _conversation(self, name: str) -> list[QARecord]:
        rng = random.Random(f"{self.seed}:{name}")
        found: dict[str, QARecord] = {}
        while len(found) < self.turns:
            single = magic_numbers(name, rng)
            found.setdefault(single.question, single)
        keys = list(found.values())
        order = rng.sample(keys, len(keys))
        passages = tuple(Passage(f"Note {place}", one.passages[0].text) for place, one in enumerate(order, start=1))
        titles = {one.question: (note.title,) for one, note in zip(order, passages, strict=True)}
        asked = [replace(one, passages=passages, supporting_titles=titles[one.question]) for one in keys]
        return [replace(turn, id=f"{name}-{turn.task}") for turn in asked_in_turn(asked)]
