"""Tasks whose context grows with the budget: records are made in any size, and the largest that fits is taken."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lrsa_lit.data.prompts import Example, Prompt, TooLong, encode
from lrsa_lit.data.records import QARecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SizedTask(NamedTuple):
    """How a record is made of its id, what draws it, its size and the budget; its smallest size; and its prompt."""

    make: Callable[[str, random.Random, int, int], QARecord]
    smallest: int
    prompt: Prompt


def largest(
    make: Callable[[int], QARecord],
    smallest: int,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> tuple[QARecord, Example | TooLong]:
    """The largest record that fits the budget and its example; :class:`TooLong` if even the smallest does not.

    ``make`` gives a record of a size, and a larger one has no fewer tokens; the rest is as for
    :func:`~lrsa_lit.data.prompts.encode`.
    """
    size, record = smallest, make(smallest)
    found = encode(record, tokenizer, max_tokens, prompt)
    if isinstance(found, TooLong):
        return record, found
    limit = math.inf
    per_step = len(found["input_ids"]) / size
    while True:
        length = len(found["input_ids"])
        trial = int(min(size + max((max_tokens - length) // per_step, 1), limit - 1))
        if trial <= size:
            return record, found
        tried = make(trial)
        larger = encode(tried, tokenizer, max_tokens, prompt)
        # Records grow evenly but for the last tokens, so a few trials suffice.
        tokens = larger.tokens if isinstance(larger, TooLong) else len(larger["input_ids"])
        per_step = max((tokens - length) / (trial - size), 0.1)
        if isinstance(larger, TooLong):
            limit = trial
        else:
            size, record, found = trial, tried, larger
