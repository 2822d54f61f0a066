"""Facts that identify the questions of a split: a digest of their tokens, and which of them share a context."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrsa_lit.data.collate import learnt_spans
from lrsa_lit.data.prompts import Example

_QUESTION = 160
"""Number of tokens at the end of a prompt that may be its instruction and question."""

_FIELDS = ("id", "prompt_length", "gold_spans", "answer_spans", "answers", "match")


@dataclass(frozen=True)
class SplitFacts:
    """The questions of a split, or of one data set's part of it.

    Attributes:
        digest: digest of all tokens, spans and answers in order; twelve hex digits.
        questions: number of questions.
        length: mean number of tokens per example, rounded down.
        contexts: the number of each question's context, counting from 0. Questions share a context if their prompts
            differ only in the question, or if they have the same subject.
    """

    digest: str
    questions: int
    length: int
    contexts: list[int]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> SplitFacts:
        """The facts of the given examples, at least one."""
        kept: list[Any] = [
            {**example, "input_ids": np.asarray(example["input_ids"], dtype=np.int64)} for example in examples
        ]
        flat = np.concatenate([example["input_ids"] for example in kept])
        return cls(_digest(kept, flat), len(kept), len(flat) // len(kept), _contexts(kept))


def _digest(examples: Sequence[Any], flat: Any) -> str:
    # Tokens below 65,536 are hashed as 16 bits, so that digests of earlier results stay valid.
    found = hashlib.sha256(flat.astype("<u2" if flat.max() < 1 << 16 else "<u4").tobytes())
    found.update(np.asarray([len(example["input_ids"]) for example in examples]).astype("<i4").tobytes())
    # JSON cannot encode NumPy's integers.
    found.update(json.dumps(list(map(_about, examples)), ensure_ascii=False, default=int).encode())
    return found.hexdigest()[:12]


def _about(example: Any) -> dict[str, Any]:
    # "subject" and "learnt" are left out where they say nothing new, so that earlier digests stay valid.
    names = (*_FIELDS, "subject") if example.get("subject") else _FIELDS
    usual = [(example["prompt_length"], len(example["input_ids"]))]
    learnt = {} if (spans := learnt_spans(example)) == usual else {"learnt": spans}
    return {name: example[name] for name in names} | learnt


def _contexts(examples: Sequence[Any]) -> list[int]:
    # Prompts with the same context start with the same tokens, so only few pairs have to be compared.
    firsts: defaultdict[object, list[tuple[int, Any]]] = defaultdict(list)
    found: list[int] = []
    numbers = itertools.count()
    for example in examples:
        alike = firsts[example.get("subject") or example["input_ids"][: _QUESTION + 1].tobytes()]
        number = next((number for number, first in alike if _same_context(first, example)), None)
        if number is None:
            number = next(numbers)
            alike.append((number, example))
        found.append(number)
    return found


def _same_context(one: Any, other: Any) -> bool:
    """Whether two prompts with the same start differ only at the end; short prompts count as different.

    Examples with a subject were grouped by it, so they share a context: texts made from one article may start
    differently.
    """
    if one.get("subject"):
        return True
    # Later turns are not part of the context.
    shared = min(each.get("first_turn", each["prompt_length"]) for each in (one, other)) - _QUESTION
    return shared > _QUESTION and np.array_equal(one["input_ids"][:shared], other["input_ids"][:shared])
