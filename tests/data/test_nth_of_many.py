import random
import re
from statistics import fmean

import pytest
from helpers import refused

from lrsa_lit.data.nth_of_many import NthOfMany, _ordinal
from lrsa_lit.data.prompts import TooLong
from lrsa_lit.data.requests import KINDS, TOPICS, text
from lrsa_lit.evaluation.answer_scores import exact_match, f1_score

BUDGET = 6000
EXCHANGE = re.compile(r"User: Write a ([\w ]+) about (\w+)\.\nAssistant: (.*?)\n\n", re.DOTALL)
QUESTION = re.compile(r"Write (\w{10}) and, behind a blank, repeat the (\d+)\w\w ([\w ]+) about (\w+) of the ")


@pytest.fixture(scope="module")
def data(tokenizer):
    return NthOfMany(tokenizer=tokenizer, max_tokens=BUDGET, train=6, val=6, test=9)


def test_the_conversation_gives_the_answer(data, tokenizer):
    """By counting the requests of that kind and topic in the prompt."""
    for record in data.records("test"):
        example = data.to_example(record)
        prompt = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
        prefix, place, kind, topic = QUESTION.search(prompt).groups()
        alike = [found for *asked, found in EXCHANGE.findall(prompt) if asked == [kind, topic]]
        assert record.task == f"of-{len(alike)}"
        assert len(set(alike)) == len(alike)
        assert record.answers == (f"{prefix} {alike[int(place) - 1]}",)
        assert prompt.count(prefix) == 1
        assert BUDGET - 400 < len(example["input_ids"]) <= BUDGET
        (span,) = example["gold_spans"]
        assert alike[int(place) - 1] in tokenizer.decode(example["input_ids"][slice(*span)])


def test_requests_lie_anywhere_and_any_of_them_is_asked_for(tokenizer):
    data = NthOfMany(tokenizer=tokenizer, max_tokens=BUDGET, of=[3], test=40)
    records = data.records("test")
    assert {record.supporting_titles[0] for record in records} == {"Text 1", "Text 2", "Text 3"}
    starts = [data.to_example(record)["gold_spans"][0][0] for record in records]
    assert min(starts) < BUDGET / 4 < 3 * BUDGET / 4 < max(starts)


def test_other_texts_of_a_kind_score_less_than_the_one_asked_for():
    rng, found = random.Random(0), []
    for _ in range(150):
        asked = rng.choice(KINDS), rng.choice(TOPICS)
        one, other = (f"x {text(*asked, rng)}" for _ in range(2))
        found.append(f1_score(other, [one], "verbatim"))
        assert f1_score(one, [one], "verbatim") == exact_match(one, [one], "verbatim") == 1.0
    assert 0.3 < fmean(found) < 0.65
    assert max(found) < 0.95


def test_the_seed_decides_and_splits_differ(data, tokenizer):
    same, other = (NthOfMany(tokenizer=tokenizer, max_tokens=BUDGET, test=9, seed=seed) for seed in (0, 1))
    assert data.records("test") == same.records("test")
    first = data.records("test")[0]
    assert data.to_example(first) == same.to_example(first)
    answers = {record.answers for split in ("train", "test") for record in data.records(split)}
    assert len(answers | {record.answers for record in other.records("test")}) == 24
    assert [record.task for record in data.records("val")] == ["of-2", "of-4", "of-8"] * 2


def test_what_does_not_fit_is_too_long(tokenizer):
    data = NthOfMany(tokenizer=tokenizer, max_tokens=1500, of=[8], test=1)
    assert isinstance(data.to_example(data.records("test")[0]), TooLong)


def test_ordinals():
    wanted = "1st 2nd 3rd 4th 11th 12th 13th 21st 102nd 111th"
    assert " ".join(_ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)) == wanted


@pytest.mark.parametrize(("of", "value"), [([], []), ([2, 2], [2, 2]), ([4, 1], 1)])
def test_a_bad_number_of_requests_is_refused(of, value):
    with refused("of", value):
        NthOfMany(of=of)
