from itertools import chain, combinations
from pathlib import Path
from typing import Any

import data_files
import pytest
from helpers import refused
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.collate import IGNORE_INDEX
from lrsa_lit.data.hotpotqa import HotpotQA, load_questions, paragraph_pool
from lrsa_lit.data.module import SPLITS
from lrsa_lit.data.prompts import INSTRUCTION
from lrsa_lit.evaluation.answer_scores import normalize_answer

MAX_TOKENS = 3000


@pytest.fixture(scope="module")
def questions():
    return {question["_id"]: question for question in load_questions()}


@pytest.fixture(scope="module")
def built(tokenizer, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRSA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        data = HotpotQA(tokenizer=tokenizer, max_tokens=MAX_TOKENS, limit={"train": 12, "val": 24, "test": 24})
        data.prepare_data()
        data.setup()
    return data


@pytest.fixture(scope="module")
def batches(built):
    loaders = {"train": built.train_dataloader, "val": built.val_dataloader, "test": built.test_dataloader}
    return {split: list(loaders[split]()) for split in SPLITS}


def gold_titles(question: dict[str, Any]) -> set[str]:
    return {title for title, _ in question["supporting_facts"]}


def paragraphs(tokenizer: PreTrainedTokenizerFast, batch: dict[str, Any]) -> list[str]:
    prompt = tokenizer.decode(batch["input_ids"][0][batch["labels"][0] == IGNORE_INDEX])
    return prompt.partition(f"\n\n{INSTRUCTION}")[0].removeprefix("<|im_start|>user\n").split("\n\n")


def test_the_pool_has_a_paragraph_for_each_title(questions):
    pool = paragraph_pool(list(questions.values())).passages
    assert len(pool) == len({passage.title for passage in pool}) == 66_581


def test_splits_share_no_gold_paragraph(built, questions):
    ids = {split: [record.id for record in built.records(split)] for split in SPLITS}
    assert sorted(chain.from_iterable(ids.values())) == sorted(questions)
    gold = [{title for name in ids[split] for title in gold_titles(questions[name])} for split in SPLITS]
    assert all(first.isdisjoint(second) for first, second in combinations(gold, 2))
    assert {split: len(names) for split, names in ids.items()} == {"train": 5923, "val": 741, "test": 741}


def test_the_budget_holds_and_is_used(batches):
    lengths = [batch["input_ids"].shape[1] for split in SPLITS for batch in batches[split]]
    assert len(lengths) == 60
    assert max(lengths) <= MAX_TOKENS
    assert sum(lengths) / len(lengths) > 0.95 * MAX_TOKENS


def test_distractors_neither_answer_nor_belong_to_another_split(built, batches, questions, tokenizer):
    gold = {s: {t for record in built.records(s) for t in gold_titles(questions[record.id])} for s in SPLITS}
    drawn: list[str] = []
    for split in SPLITS:
        foreign = set().union(*(gold[other] for other in SPLITS if other != split))
        for batch in batches[split]:
            question = questions[batch["id"][0]]
            answer = normalize_answer(question["answer"])
            shown = {text.partition("\n")[0]: text for text in paragraphs(tokenizer, batch)}
            assert gold_titles(question) < set(shown)
            for title in set(shown) - gold_titles(question):
                drawn.append(title)
                assert title not in foreign
                assert answer in ("yes", "no") or f" {answer} " not in f" {normalize_answer(shown[title])} "
    assert len(drawn) > 120
    assert len(set(drawn)) > 0.95 * len(drawn)


def test_neither_the_gold_again_nor_what_gives_the_answer_away_is_drawn(small, tokenizer):
    data = HotpotQA(tokenizer=tokenizer, source=str(small), sha256=None, max_tokens=4096, val_fraction=0.3)
    record = next(record for split in SPLITS for record in data.records(split) if record.id == "q0")
    text = tokenizer.decode(data.to_example(record)["input_ids"])
    assert "harmless 0" in text
    assert "gives away 0" not in text
    assert text.count("Gold 0a\n") == text.count("Gold 0b\n") == 1


def test_gold_lies_anywhere(batches):
    depths = [start / batch["prompt_length"][0] for batch in batches["test"] for start, _ in batch["gold_spans"][0]]
    assert min(depths) < 0.2
    assert max(depths) > 0.6


def test_a_context_depends_on_the_seed_and_the_question_alone(tokenizer, batches):
    again = HotpotQA(tokenizer=tokenizer, max_tokens=MAX_TOKENS)
    wanted = {batch["id"][0]: batch["input_ids"][0].tolist() for batch in batches["val"][3:6]}
    records = [record for record in again.records("val") if record.id in wanted]
    assert {record.id: again.to_example(record)["input_ids"] for record in reversed(records)} == wanted
    again.seed = 1
    assert all(again.to_example(record)["input_ids"] != wanted[record.id] for record in records)


@pytest.fixture
def small(tmp_path):
    return Path(data_files.hotpotqa(tmp_path)["source"])


def test_the_question_may_come_first(small, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path))
    own = HotpotQA(tokenizer=tokenizer, source=str(small), sha256=None, max_tokens=400)
    first = HotpotQA(
        tokenizer=tokenizer, source=str(small), sha256=None, max_tokens=400, prompt="{input}\n{context} | {input}"
    )
    assert own.fingerprint != first.fingerprint
    for data, before, behind in ((own, "", f"\n\n{INSTRUCTION}"), (first, "Where?\n", " | Where?")):
        data.prepare_split("train")
        for example in data.open_split("train"):
            assert len(example["input_ids"]) <= 400
            text = tokenizer.decode(example["input_ids"][: example["prompt_length"]])
            assert text.startswith(f"<|im_start|>user\n{before}")
            assert behind in text
            number = example["id"].removeprefix("q")
            gold = [tokenizer.decode(example["input_ids"][slice(*span)]).strip() for span in example["gold_spans"]]
            assert sorted(gold) == [f"Gold {number}a\nFirst.", f"Gold {number}b\nIt is Vilnius {number}."]
    for prompt in ("{input}", "{context}{context}{input}", "{context}"):
        with refused("prompt"):
            HotpotQA(prompt=prompt)


def test_a_file_that_is_not_what_it_should_be_is_refused(small, tokenizer):
    with refused("source", str(small), reason="sha256"):
        HotpotQA(tokenizer=tokenizer, source=str(small)).prepare_data()
    small.write_text('[{"_id": "1", "question": "Q?"}]')
    with refused(str(small), reason="question 1: answer: is missing"):
        load_questions(str(small), None)


def test_fractions_are_checked_at_once():
    with refused("val_fraction", 1.5):
        HotpotQA(val_fraction=1.5)
