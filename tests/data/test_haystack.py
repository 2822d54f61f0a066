import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.haystack import ParagraphPool, interleave
from lrsa_lit.data.prompts import TooLong, encode
from lrsa_lit.data.records import Passage

POOL = [Passage(f"Filler {number}", "word " * (number % 7)) for number in range(200)]


@pytest.mark.parametrize("max_tokens", [300, 511, 1000, 2048])
def test_contexts_fill_the_budget_and_never_exceed_it(record, tokenizer, max_tokens):
    pool = ParagraphPool(POOL)
    _, example = pool.fill(record, lambda _: True, random.Random(0), tokenizer, max_tokens)
    # The shortest paragraph of the pool takes 10 tokens.
    assert max_tokens - 10 < len(example["input_ids"]) <= max_tokens
    for passage in record.passages:
        assert passage.text in tokenizer.decode(example["input_ids"])


def test_a_count_that_is_too_low_is_corrected(record, tokenizer):
    class Optimist(ParagraphPool):
        def tokens(self, positions: list[int], _: object) -> list[int]:
            return [1] * len(positions)

    _, example = Optimist(POOL).fill(record, lambda _: True, random.Random(0), tokenizer, 600)
    assert 550 < len(example["input_ids"]) <= 600


def test_a_record_without_room_for_more_is_kept_as_it_is(record, tokenizer):
    alone = encode(record, tokenizer, 1024)
    length = len(alone["input_ids"])
    pool = ParagraphPool(POOL)
    assert pool.fill(record, lambda _: True, random.Random(0), tokenizer, length + 5) == (record, alone)
    assert pool.fill(record, lambda _: True, random.Random(0), tokenizer, length - 1) == (record, TooLong(length))


def test_a_pool_may_run_out(record, tokenizer):
    pool = ParagraphPool(POOL)
    _, example = pool.fill(record, lambda position: position in (3, 5), random.Random(0), tokenizer, 4096)
    text = tokenizer.decode(example["input_ids"])
    assert [number for number in range(200) if f"Filler {number}\n" in text] == [3, 5]


def test_only_what_is_used_is_tokenised(record, tokenizer):
    pool = ParagraphPool(POOL)
    pool.fill(record, lambda _: True, random.Random(0), tokenizer, 400)
    assert 0 < len(pool._tokens) <= 64


def test_draws_reach_every_paragraph_once():
    pool = ParagraphPool(POOL)
    assert sorted(pool.draw(random.Random(1))) == list(range(200))
    assert list(pool.draw(random.Random(1))) == list(pool.draw(random.Random(1)))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["The Isk!"], True),
        (["isk"], True),
        (["Is"], False),
        (["long River"], True),
        (["no"], False),
        (["x", "isk"], True),
    ],
)
def test_mentions_are_whole_words_of_title_and_text(answers, expected):
    pool = ParagraphPool([Passage("Isk (river)", "No long-river; a long river.")])
    assert pool.mentions(0, answers) is expected


@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 99))
def test_interleaving_keeps_both_orders(kept, fillers, seed):
    first = [Passage("kept", str(number)) for number in range(kept)]
    second = [Passage("filler", str(number)) for number in range(fillers)]
    mixed = interleave(first, second, random.Random(seed))
    assert [passage for passage in mixed if passage.title == "kept"] == first
    assert [passage for passage in mixed if passage.title == "filler"] == second


def test_any_place_is_possible():
    kept, fillers = [Passage("kept", "")], [Passage("filler", "")] * 4
    places = {interleave(kept, fillers, random.Random(seed)).index(kept[0]) for seed in range(100)}
    assert places == {0, 1, 2, 3, 4}
