import random
import re
from typing import Any

import pytest
from helpers import refused

from lrsa_lit.data.needle import Needles
from lrsa_lit.data.needle_tasks import TASKS, magic_numbers, variable_tracking
from lrsa_lit.evaluation.answer_scores import recall

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


def task(name: str, seed: int = 0) -> Any:
    return TASKS[name]("id", random.Random(seed))


@pytest.fixture(scope="module")
def data(tokenizer):
    return Needles(tokenizer=tokenizer, max_tokens=2500, train=10, val=5, test=10)


@pytest.mark.parametrize(
    ("name", "keys", "needles", "answers"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_the_sizes_are_rulers(name, keys, needles, answers):
    record = task(name)
    found = [NEEDLE.fullmatch(passage.text).groups() for passage in record.passages]
    assert len({key for key, _ in found}) == keys
    assert len({value for _, value in found}) == len(found) == needles
    assert len(record.answers) == len(record.supporting_titles) == answers
    assert record.match == "all"


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
@pytest.mark.parametrize("seed", range(5))
def test_the_question_and_the_needles_give_the_answers(name, seed):
    record = task(name, seed)
    asked = re.findall(r"[a-z]+-[a-z]+", record.question)
    held = [NEEDLE.fullmatch(passage.text).groups() for passage in record.passages]
    assert {value for key, value in held if key in asked} == set(record.answers)
    supporting = {p.title: p.text for p in record.passages if p.title in record.supporting_titles}
    assert all(any(answer in text for text in supporting.values()) for answer in record.answers)
    assert record.question.startswith("What is the" if len(record.answers) == 1 else "What are all the")


def test_needles_are_not_in_the_order_of_the_answers():
    records = [task("niah_multivalue", seed) for seed in range(5)]
    orders = [[NEEDLE.fullmatch(passage.text)[2] for passage in record.passages] for record in records]
    assert any(order != list(record.answers) for order, record in zip(orders, records, strict=True))


def test_questions_read_as_rulers_do():
    one = magic_numbers("id", random.Random(0))
    assert re.fullmatch(r"What is the special magic number for \S+ mentioned in the provided text\?", one.question)
    three = magic_numbers("id", random.Random(0), keys=3, queries=3)
    assert re.fullmatch(
        r"What are all the special magic numbers for \S+, \S+, and \S+ mentioned in the provided text\?", three.question
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_leads_from_the_value_to_every_variable(seed):
    record = variable_tracking("id", random.Random(seed))
    first, *hops = (passage.text for passage in record.passages)
    variable, value = re.fullmatch(r"VAR ([A-Z]{5}) = (\d{5})", first).groups()
    reached = [variable]
    for hop in hops:
        new, old = re.fullmatch(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})", hop).groups()
        assert old == reached[-1]
        reached.append(new)
    assert record.answers == tuple(reached)
    assert len(set(reached)) == 5
    assert f" {value} " in record.question


def test_needles_lie_in_a_full_haystack_in_their_order(data, tokenizer):
    for record in data.records("test"):
        example = data.to_example(record)
        text = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
        places = [text.find(f"\n\n{passage.title}\n{passage.text}\n\n") for passage in record.passages]
        first = text.startswith(f"<|im_start|>user\n{record.passages[0].title}\n{record.passages[0].text}\n\n")
        assert -1 not in places[1:]
        assert places[0] != -1 or first
        assert places == sorted(places)
        assert recall(text, record.answers, "all") == 1.0
        assert 2300 < len(example["input_ids"]) <= 2500


def test_tasks_take_turns_and_splits_differ(data):
    assert [record.id for record in data.records("val")] == [f"val-{name}-{n}" for n, name in enumerate(TASKS)]
    train, test = ([record.answers for record in data.records(split)] for split in ("train", "test"))
    assert len({*train, *test}) == 20


def test_the_seed_decides(data, tokenizer):
    same, other = (Needles(tokenizer=tokenizer, train=10, seed=seed).records("train") for seed in (0, 1))
    assert data.records("train") == same
    assert all(a.answers != b.answers for a, b in zip(same, other, strict=True))


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({"tasks": ["niah_single", "niah_doble"]}, "tasks", ["niah_doble"]),
        ({"tasks": []}, "tasks", []),
        ({"test": 0}, "test", 0),
    ],
)
def test_a_bad_parameter_is_refused_at_once(parameters, field, value):
    with refused(field, value):
        Needles(**parameters)
