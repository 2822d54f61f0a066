"""Which sentences support an answer, and which are drawn to be told from them."""

import json
import random

import pytest
import torch
from sentence_questions import questions, written

from lrsa_lit import UserError
from lrsa_lit.data import HotpotQA
from lrsa_lit.data.sentence_facts import Facts, collate_facts, cut, draw, supports_too
from lrsa_lit.data.supporting_facts import SupportingFacts
from lrsa_lit.models.tiny import tiny_tokenizer


def module(path, **arguments):
    return SupportingFacts(tokenizer=tiny_tokenizer(), **written(path / "questions.json") | arguments)


def contexts(data, split):
    return [make() for make in data.facts(split)]


def test_sentences_of_a_context(tmp_path):
    data = module(tmp_path, max_tokens=4096)
    (facts, *_) = contexts(data, "test")
    question = next(each for each in questions(40) if each["_id"] == facts.id)
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(facts.question) == question["question"]
    texts = [text.strip() for _, sentences in question["context"] for text in sentences]
    titles = [title for title, sentences in question["context"] for _ in sentences]
    firsts = [number % 3 == 0 for number in range(15)]
    shown = [f"{title} {text}" if first else text for title, text, first in zip(titles, texts, firsts, strict=True)]
    assert [tokenizer.decode(ids) for ids in facts.sentences] == shown
    assert facts.keys == list(zip(titles, texts, strict=True))
    assert facts.lengths == [len(text.encode()) for text in texts]
    assert facts.titles == [len(title.encode()) for title, _ in question["context"]]
    assert facts.supporting == [0, 5]


def test_splits_are_those_of_hotpotqa(tmp_path):
    data = module(tmp_path, max_tokens=4096)
    other = HotpotQA(tokenizer=tiny_tokenizer(), **written(tmp_path / "questions.json"))
    for split in ("train", "val", "test"):
        assert [facts.id for facts in contexts(data, split)] == [record.id for record in other.records(split)]


def test_no_gold_paragraph_of_another_split_is_trained_on(tmp_path):
    data = module(tmp_path, max_tokens=4096)
    gold = {split: set() for split in ("train", "val", "test")}
    for split in gold:
        for facts in contexts(data, split):
            gold[split] |= {facts.keys[number][0] for number in facts.supporting}
    trained = {title for facts in contexts(data, "train") for title, _ in facts.keys}
    assert not trained & (gold["val"] | gold["test"])
    assert data.report["train"]["foreign paragraphs left out"] > 0
    assert {title for facts in contexts(data, "test") for title, _ in facts.keys} & gold["train"]


@pytest.mark.parametrize("most", [200, 250, 330])
def test_training_contexts_lose_what_is_not_gold(tmp_path, most):
    data = module(tmp_path, max_tokens=most)
    whole = {facts.id: facts for facts in contexts(module(tmp_path, max_tokens=4096), "train")}
    found = contexts(data, "train")
    assert len(found) + data.report["train"]["too_long"] == len(whole)
    for facts in found:
        before = whole[facts.id]
        assert sum(map(len, facts.sentences)) <= most
        assert [facts.keys[n] for n in facts.supporting] == [before.keys[n] for n in before.supporting]
        assert len(facts.sentences) > len(facts.supporting)
        assert cut(before, most) == facts
    assert sum(map(len, contexts(data, "test")[0].sentences)) > most


def test_nothing_fits(tmp_path):
    with pytest.raises(UserError, match="max_tokens: 20 leaves no question in the split 'train'"):
        module(tmp_path, max_tokens=20).facts("train")


def test_a_fact_that_is_not_there_is_none(tmp_path):
    given = questions(40)
    for question in given:
        question["supporting_facts"].append([question["context"][0][0], 902])
    (tmp_path / "other.json").write_text(json.dumps(given))
    data = SupportingFacts(str(tmp_path / "other.json"), None, tokenizer=tiny_tokenizer(), max_tokens=4096)
    assert {tuple(facts.supporting) for facts in contexts(data, "train")} == {(0, 5)}


def made(supporting, bm25, paragraphs):
    count = len(bm25)
    keys = [(f"T{place}", f"text {number}") for number, place in enumerate(paragraphs)]
    return Facts("q", [1], [[2]] * count, keys, paragraphs, [1] * count, [1] * (max(paragraphs) + 1), supporting, bm25)


def test_half_of_the_negatives_are_from_gold_paragraphs_and_rank_below():
    facts = made([0, 4], [5.0, 1, 9, 2, 3, 1, 4, 8, 2], [0, 0, 0, 1, 2, 2, 1, 1, 1])
    for seed in range(30):
        positive, (hard, other) = draw(facts, 2, random.Random(seed))
        assert positive in (0, 4)
        assert facts.paragraphs[hard] in (0, 2)
        assert facts.paragraphs[other] == 1
        assert max(facts.bm25[hard], facts.bm25[other]) < facts.bm25[positive]


def test_where_too_few_rank_below_the_lowest_of_the_others_come():
    facts = made([1], [3.0, 0.0, 5.0, 4.0], [0, 0, 1, 1])
    assert draw(facts, 2, random.Random(0)) == (1, [0, 3])
    assert sorted(draw(facts, 3, random.Random(0))[1]) == [0, 2, 3]
    assert len(draw(facts, 5, random.Random(0))[1]) == 5


def test_what_supports_two_questions_is_no_negative_of_either():
    first = made([0, 1], [2.0, 1, 0], [0, 0, 0])
    second = made([1], [0.0, 2, 1], [0, 0, 0])
    candidates = [(0, 0), (1, 1), (0, 2), (1, 0)]
    assert supports_too([first, second], candidates) == [[False, True, False, True], [False, False, False, False]]


def test_batches():
    facts = made([0], [1.0, 2.0], [0, 0])
    longer = made([1], [1.0, 2.0, 3.0], [0, 1, 1])
    rows = [{"facts": each, "position": 7 + row, "repeated": row == 1} for row, each in enumerate((facts, longer))]
    batch = collate_facts(rows)
    assert batch["input_ids"].tolist() == [[2, 2, 0], [2, 2, 2]]
    assert batch["segments"].tolist() == [[0, 1, -1], [0, 1, 2]]
    assert batch["question_ids"].tolist() == [[1], [1]]
    assert (batch["position"], batch["repeated"]) == ([7, 8], [False, True])


def test_loaders_go_on_where_they_were(tmp_path):
    def ids(loader, count):
        return [[facts.id for facts in batch["facts"]] for batch, _ in zip(loader, range(count), strict=False)]

    torch.manual_seed(3)
    data = module(tmp_path, max_tokens=4096, batch_size=4)
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    rest = [[facts.id for facts in batch["facts"]] for batch in iterator]
    again = module(tmp_path, max_tokens=4096, batch_size=4).train_dataloader()
    again.load_state_dict(state)
    assert ids(again, 99) == rest
    assert len(rest) == 5
    assert [facts.id for batch in data.val_dataloader() for facts in batch["facts"]] == [
        facts.id for facts in contexts(data, "val")
    ]


@pytest.mark.parametrize(("name", "value"), [("max_tokens", 0), ("batch_size", 0), ("limit", {"all": 3})])
def test_parameters_out_of_range(tmp_path, name, value):
    with pytest.raises(UserError, match=name):
        module(tmp_path, **{name: value})
