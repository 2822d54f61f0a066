"""Filters in data sets: after contexts are filled, counted per split, and refused where there is nothing to filter."""

import json
import math
from dataclasses import dataclass, replace

import pytest
from data_files import FILES
from data_helpers import Words

from lrsa_lit.data import ChatFiles, HotpotQA, LongBench, Mixture, Passkey, QAFiles, SquadArticles
from lrsa_lit.data.filters import BM25, ContextFilter, RandomSentences, Truncate
from lrsa_lit.data.filters.filter_measures import context_measures, metrics_of
from lrsa_lit.data.hotpotqa import gold_record
from lrsa_lit.data.prompts import encode
from lrsa_lit.data.records import Passage, QARecord, check_record
from lrsa_lit.errors import UserError

QUESTION = {
    "_id": "q",
    "question": "Where?",
    "answer": "Isk",
    "supporting_facts": [["A", 1], ["B", 0], ["A", 1], ["B", 7]],
    "context": [["A", ["One. ", " Two."]], ["C", ["Nothing."]], ["B", ["Three."]]],
}


def opened(cls, tokenizer, **options):
    data = cls(tokenizer=tokenizer, **options)
    data.prepare_data("test")
    data.setup("test")
    return data


def test_labels_of_hotpotqa_are_sentences_of_the_record():
    record = gold_record(QUESTION)
    # The last label counts a sentence that is not there, as a few of the published ones do.
    assert record.supporting_sentences == (Passage("A", "Two."), Passage("B", "Three."))
    check_record(record)
    with pytest.raises(UserError, match=r"^supporting_sentences: 'Four' is not allowed; it must be a part of"):
        check_record(replace(record, supporting_sentences=(Passage("A", "Four"),)))


def test_a_context_is_filled_before_it_is_filtered(tokenizer, tmp_path):
    options = {**FILES["HotpotQA"](tmp_path), "max_tokens": 420}
    plain = opened(HotpotQA, tokenizer, **options)
    data = opened(HotpotQA, tokenizer, **options, filter=Truncate(kept=0.5))
    examples = data.open_split("test")
    assert examples["id"] == plain.open_split("test")["id"]
    for whole, example, record in zip(plain.open_split("test"), examples, data.records("test"), strict=True):
        bare = len(encode(replace(record, passages=()), tokenizer, 4096)["input_ids"])
        context, left = (len(each["input_ids"]) - bare for each in (whole, example))
        assert 0.4 * context < left <= 0.5 * context
    report = data.report["test"]
    assert report["filtered"] == len(examples)
    assert 0 < report["context tokens left"] <= report["context tokens"] / 2


def test_each_data_set_of_a_mixture_has_its_own(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    files = FILES["QAFiles"](tmp_path / "a")
    mixture = Mixture(
        {"cut": QAFiles(**files, filter=BM25(kept=0.3)), "whole": QAFiles(**FILES["QAFiles"](tmp_path / "b"))},
        {"cut": 1, "whole": 1},
        tokenizer=tokenizer,
    )
    mixture.prepare_data("test")
    mixture.setup("test")
    found = metrics_of(mixture.report["test"], "test")
    assert found["test/context/cut/context_tokens_left"] < found["test/context/cut/context_tokens"]
    assert {name.split("/")[2] for name in found} == {"cut"}


def test_measures_are_shares_of_all_and_absent_where_there_is_nothing(tokenizer):
    class Asked(QAFiles):
        def __init__(self, **kwargs):
            super().__init__(test="unread", **kwargs)

        def sources(self):
            return {}

        def records(self, split):
            facts = (Passage("A", "Isk lies there."), Passage("B", "It rained."))
            passages = (Passage("A", "Isk lies there. No word."), Passage("B", "It rained. No word."))
            yield QARecord("1", passages, "Where lies Isk?", ("Isk",), ("A", "B"), supporting_sentences=facts)
            yield QARecord("2", passages, "Where lies Isk?", ("no",))

    data = opened(Asked, tokenizer, filter=BM25(tokens=20))
    measures = context_measures(data.report["test"])
    assert measures["supporting_recall"] == 1 / 2
    assert measures["answers_left"] == 1
    assert measures["sentences_left"] == 2 / 8
    assert measures["context_tokens_left"] == len("A\nIsk lies there.")
    assert context_measures({"kept": 3}) == {}


def test_questions_about_one_context_stay_those_of_one_context(tokenizer, tmp_path):
    options = {**FILES["SquadArticles"](tmp_path), "max_tokens": 4096, "val_fraction": 0.2, "test_fraction": 0.5}
    plain, data = (
        opened(SquadArticles, tokenizer, **options, **each) for each in ({}, {"filter": RandomSentences(kept=0.9)})
    )
    facts, filtered = plain.facts("test")[""], data.facts("test")[""]
    assert filtered.digest != facts.digest
    articles = [example.rpartition("-")[0] for example in data.open_split("test")["id"]]
    assert len(filtered.contexts) == len(articles)
    assert len(set(filtered.contexts)) == len({record.passages for record in data.records("test")})


def test_a_record_that_is_cut_to_fit_is_filtered_first(tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input": "How long?", "context": "It is 212 km. " * 300, "answers": ["212 km"]}) + "\n")
    data = opened(LongBench, tokenizer, test=str(path), truncate="middle", filter=Truncate(tokens=200))
    assert data.report["test"]["truncated"] == 0
    assert data.report["test"]["context tokens left"] <= 200


def test_the_key_of_pieces_keeps_its_subject(tokenizer):
    data = opened(Passkey, tokenizer, max_tokens=2048, test=3, filter=RandomSentences(kept=0.5))
    assert data.open_split("test")["subject"] == data.open_split("test")["id"]


def test_what_has_no_context_is_refused_before_anything_is_read():
    with pytest.raises(UserError) as refused:
        ChatFiles(train="missing.jsonl", filter=Truncate())
    assert str(refused.value) == (
        "filter: 'Truncate' cannot be used: ChatFiles has no questions about passages, which a filter shortens; "
        "leave it out, or set it to null"
    )


def test_a_data_set_that_hands_nothing_to_its_filter_is_refused(tokenizer):
    class Alone(Words):
        def to_example(self, record):
            return encode(record, self.checked_tokenizer, self.max_tokens)

    with pytest.raises(UserError, match=r"^filter: the data set passes no contexts to it; leave it out"):
        Alone(tokenizer=tokenizer, filter=Truncate()).prepare_data("test")


def test_a_budget_that_leaves_no_context_at_all_is_refused_and_nothing_written(tokenizer, cache):
    with pytest.raises(UserError) as refused:
        Words(tokenizer=tokenizer, filter=RandomSentences(tokens=1)).prepare_data("test")
    assert str(refused.value).startswith("filter.init_args.tokens: 1 leaves no context in the split 'test'")
    assert not list(cache.rglob("*.arrow"))

    @dataclass(frozen=True)
    class Nothing(ContextFilter):
        def shorten(self, record, prompt):
            return ["" for _ in record.passages]

    with pytest.raises(UserError, match=r"^filter: 'Nothing' leaves no context in the split 'test'; leave it out"):
        Words(tokenizer=tokenizer, filter=Nothing()).prepare_data("test")


def test_what_a_filter_reads_is_in_the_key(tokenizer, tmp_path):
    @dataclass(frozen=True)
    class Reads(ContextFilter):
        table: str

        def shorten(self, record, prompt):
            return [passage.text for passage in record.passages]

    path = tmp_path / "table.json"
    found = set()
    for content in ("one", "two"):
        path.write_text(content)
        found.add(Words(tokenizer=tokenizer, filter=Reads(str(path))).fingerprint)
    assert len(found) == 2
    assert math.isclose(BM25().kept, 0.25)
