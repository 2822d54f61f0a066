"""Tasks that can make records of any size, so that the largest record that fits the token budget is used."""

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
    """A task: ``make(id, rng, size, max_tokens)`` makes a record; ``smallest`` is the smallest size."""

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
    """Find the largest record that fits the token budget.

    ``make`` returns a record of a given size; a larger size must not have fewer tokens. Other arguments are as for
    :func:`~lrsa_lit.data.prompts.encode`.

    Returns:
        The record and its example, or :class:`TooLong` if even the smallest record does not fit.
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
        # Length is almost linear in size, so a few trials suffice.
        tokens = larger.tokens if isinstance(larger, TooLong) else len(larger["input_ids"])
        per_step = max((tokens - length) / (trial - size), 0.1)
        if isinstance(larger, TooLong):
            limit = trial
        else:
            size, record, found = trial, tried, larger
