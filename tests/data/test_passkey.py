import random
import re
from pathlib import Path

import pytest
import yaml
from helpers import refused

import lrsa_lit.data
from lrsa_lit.data.module import SPLITS
from lrsa_lit.data.passkey import Passkey
from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.models import Backbone

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
BUDGET = 2000
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def data(tokenizer):
    return Passkey(tokenizer=tokenizer, max_tokens=BUDGET, train=30, val=10, test=20)


@pytest.fixture(scope="module")
def examples(data):
    return [data.to_example(record) for record in data.records("test")]


def parts(example, tokenizer):
    """The noise before and behind the number, the number, and the answer; all else is checked."""
    ids, length = example["input_ids"], example["prompt_length"]
    found = re.fullmatch(
        r"<\|im_start\|>user\nThere is an important info hidden inside a lot of irrelevant text\. Find it and memorize "
        r"them\. I will quiz you about the important information there\.\n"
        r"(?:(?P<before>The grass is green\..*)\n)?"
        r"The pass key is (?P<key>\d+)\. Remember it\. (?P=key) is the pass key\.\n"
        r"(?:(?P<behind>The grass is green\..*)\n)?What is the pass key\?<\|im_end\|>\n<\|im_start\|>assistant\n"
        r"The pass key is",
        tokenizer.decode(ids[:length]),
    )
    return found["before"] or "", found["behind"] or "", found["key"], tokenizer.decode(ids[length:])


def test_the_text_is_the_published_one_and_full(data, examples, tokenizer):
    for record, example in zip(data.records("test"), examples, strict=True):
        before, behind, key, answer = parts(example, tokenizer)
        assert re.fullmatch(r"[1-9]\d{63}", key)
        assert record.answers == (key,)
        assert answer == f" {key}<|im_end|>"
        for noise in (before, behind):
            assert (NOISE * 40).startswith(noise)
            assert not noise or noise.endswith(".")
        assert BUDGET - 30 < len(example["input_ids"]) <= BUDGET
        # The number stands in the text twice, in one sentence after another.
        assert len(example["gold_spans"]) == 1
        assert len(example["answer_spans"]) == 2


def test_depths_are_even_and_scored_apart(data, examples, tokenizer):
    assert [example["task"] for example in examples[:10]] == [
        f"depth_{percent:03}" for percent in (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
    ]
    assert [example["task"] for example in examples[10:]] == [example["task"] for example in examples[:10]]
    for number, example in enumerate(examples):
        before, behind, _, _ = parts(example, tokenizer)
        depth = before.count(".") / (before + behind).count(".")
        assert depth == pytest.approx(number % 10 / 9, abs=0.02)
    assert data.score_of("depth_000") == "em"


def test_in_training_the_number_lies_anywhere(data, tokenizer):
    depths = []
    for record in data.records("train"):
        before, behind, _, _ = parts(data.to_example(record), tokenizer)
        depths.append(len(before) / len(before + behind))
        assert record.task == ""
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert len({round(depth, 2) for depth in depths}) > 15


@pytest.mark.parametrize("digits", [1, 2, 7, 64])
def test_splits_have_numbers_of_their_own(digits):
    data = Passkey(digits=digits, train=200, val=200, test=200)
    keys = {split: {record.answers[0] for record in data.records(split)} for split in SPLITS}
    assert all(len(key) == digits and key[0] != "0" for found in keys.values() for key in found)
    remainders = [{int(key) % 3 for key in found} for found in keys.values()]
    assert [len(found) for found in remainders] == [1, 1, 1]
    assert len(set().union(*remainders)) == 3
    if digits == 64:
        assert [len(found) for found in keys.values()] == [200, 200, 200]


def test_contexts_are_apart_though_their_noise_is_not(examples):
    """Numbers at the very end leave prompts that begin alike for long."""
    assert SplitFacts.of(examples).contexts == list(range(len(examples)))


def test_the_seed_decides(data, tokenizer):
    same, other = (Passkey(tokenizer=tokenizer, test=20, seed=seed).records("test") for seed in (0, 1))
    assert data.records("test") == same
    assert not {record.answers for record in same} & {record.answers for record in other}


def test_four_hundred_questions_are_the_default():
    records = Passkey().records("test")
    tasks = [record.task for record in random.Random(0).sample(records, len(records))]
    assert {tasks.count(task) for task in tasks} == {40}


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({"digits": 0}, "digits", 0),
        ({"depths": 1}, "depths", 1),
        ({"test": 0}, "test", 0),
        ({"train": 0.5}, "train", 0.5),
    ],
)
def test_a_bad_parameter_is_refused_at_once(parameters, field, value):
    with refused(field, value):
        Passkey(**parameters)


@pytest.fixture(scope="module")
def smollm2():
    """The shipped model's tokenizer, before each test has a cache of its own: converting the model takes 20 s."""
    model = yaml.safe_load((CONFIGS / "model" / "smollm2.yaml").read_text())["model"]
    return Backbone(**model["backbone"]).tokenizer


@pytest.mark.slow
def test_shipped_configs_leave_room_for_the_answers_of_smollm2(smollm2):
    for name, count in (("passkey", 10), ("several_values", 4), ("ruler13", 13)):
        settings = yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text())
        make = getattr(lrsa_lit.data, settings["data"]["class_path"].rpartition(".")[2])
        data = make(**settings["data"]["init_args"] | {"tokenizer": smollm2, "test": count})
        data.prepare_data("test")
        data.setup("test")
        assert data.unanswerable("test", settings["model"]["max_new_tokens"]) == 0
        if name == "passkey":
            # A token for each digit and one for the blank; the end of the message is the 66th.
            assert [data.unanswerable("test", tokens) for tokens in (65, 64)] == [0, count]
