"""Filters that measure by the whole prompt, with tiny's tokenizer of bytes."""

import pytest

from lrsa_lit.data.filters import BM25, RandomSentences, Truncate
from lrsa_lit.data.filters.filtered_examples import encode_filtered
from lrsa_lit.data.prompts import PROMPT, TooLong, encode, prompt_tokens
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RECORD = QARecord(
    id="q",
    passages=(Passage("Town", "It lies here. A river is near. " * 9), Passage("Lake", "It is deep. Boats go. " * 7)),
    question="Where does the town lie?",
    answers=("here",),
)


def filtered(shortens, max_tokens=2000, whole=None):
    return encode_filtered(shortens, RECORD, whole, TOKENIZER, max_tokens, PROMPT)


@pytest.mark.parametrize("kept", [0.9, 0.61, 0.5])
@pytest.mark.parametrize("kind", [Truncate, RandomSentences, BM25])
def test_a_share_of_the_prompt_counts_what_stands_around_the_context(kind, kept):
    total = encode(RECORD, TOKENIZER, 2000)["prompt_length"]
    assert prompt_tokens(RECORD, TOKENIZER) == total
    example = filtered(kind(kept=kept, of="prompt"))
    assert example["source_length"] == total
    assert kept * total - 40 < example["prompt_length"] <= kept * total
    # The same share of the context leaves a longer prompt.
    assert filtered(kind(kept=kept))["prompt_length"] > example["prompt_length"]


def test_tokens_are_those_of_the_prompt():
    # White space at the end of what stays is not shown.
    assert 325 < filtered(Truncate(tokens=333, of="prompt"))["prompt_length"] <= 333
    around = prompt_tokens(RECORD, TOKENIZER) - Truncate.count(_used(), RECORD.passages, PROMPT)
    assert filtered(Truncate(tokens=around - 1, of="prompt"))["filtered"]["context tokens left"] == 0


def test_prompts_that_do_not_fit_whole_are_left_out_where_they_are_measured():
    whole = encode(RECORD, TOKENIZER, 2000)
    most = len(whole["input_ids"]) - 1
    assert isinstance(filtered(Truncate(of="prompt"), most), TooLong)
    example = filtered(Truncate(), most)
    assert example["source_length"] == whole["prompt_length"]
    assert filtered(Truncate(), whole=whole)["source_length"] == whole["prompt_length"]


def _used():
    shortens = Truncate()
    shortens.use(TOKENIZER)
    return shortens
