"""Passkey retrieval: one long number hidden in noise at several depths, to be repeated exactly.

Source: Mohtashami and Jaggi, "Landmark Attention", NeurIPS 2023 (arXiv 2305.16300), for the text; LagKV (arXiv
2504.04704) asks for 64 digits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from lrsa_lit.data.module import SPLITS, QADataModule, Score, Split, at_least
from lrsa_lit.data.prompts import Example, Prompt, TooLong
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.ruler_tasks import NOISE, in_pieces
from lrsa_lit.data.sized import largest

PROMPT = Prompt(
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n{context}\n{input}",
    answer="The pass key is",
    heading=None,
)
_QUESTION = "What is the pass key?"
_SENTENCES = [f"{sentence}." for sentence in NOISE.removesuffix(".").split(". ")]


class Passkey(QADataModule):
    """A number hidden in as many noise sentences as fit into ``max_tokens``; each depth is scored separately.

    Splits share no number: the remainder modulo 3 differs between them. In training, the depth is random.

    Args:
        digits: digits of the number; the first one is not 0.
        depths: number of depths in validation and test, evenly spaced from the start of the noise to its end. Examples
            alternate between them.
        train: number of training examples.
        val: number of validation examples.
        test: number of test examples.
        kwargs: see QADataModule.
    """

    score: ClassVar[Score] = "em"

    def __init__(
        self, digits: int = 64, depths: int = 10, train: int = 1000, val: int = 100, test: int = 400, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.digits = at_least("digits", digits, 1)
        self.depths = at_least("depths", depths, 2)
        self.train = at_least("train", train, 1)
        self.val = at_least("val", val, 1)
        self.test = at_least("test", test, 1)

    def records(self, split: Split) -> Sequence[QARecord]:
        """The questions of a split, with one noise sentence each; ids such as "test-0", tasks such as "depth_033"."""
        return [self._of_size(f"{split}-{number}", 1) for number in range(getattr(self, split))]

    def to_example(self, record: QARecord) -> Example | TooLong:
        """The example with as much noise as fits. Its id is its subject, because contexts look alike but differ."""
        grown = partial(self._of_size, record.id)
        example = self.encode(*largest(grown, 1, PROMPT, self.checked_tokenizer, self.max_tokens), PROMPT)
        if not isinstance(example, TooLong):
            example["subject"] = record.id
        return example

    def _of_size(self, name: str, sentences: int) -> QARecord:
        split, number = name.split("-")
        rng = random.Random(f"{self.seed}:{name}")
        # A power of ten is 1 modulo 3 and the step is 3, so each split has its own remainder.
        key = rng.randrange(10 ** (self.digits - 1) + SPLITS.index(split), 10**self.digits, 3)
        depth = rng.random() if split == "train" else int(number) % self.depths / (self.depths - 1)
        before = round(depth * sentences)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        parts = [(_noise(before), False), (needle, True), (_noise(sentences - before), False)]
        return QARecord(
            id=name,
            passages=in_pieces([part for part in parts if part[0]], "\n"),
            question=_QUESTION,
            answers=(str(key),),
            supporting_titles=("Needle 1",),
            task="" if split == "train" else f"depth_{100 * depth:03.0f}",
        )


def _noise(sentences: int) -> str:
    return " ".join(_SENTENCES[place % len(_SENTENCES)] for place in range(sentences))
