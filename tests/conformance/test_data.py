"""A data set has valid records in splits that share none, shows all of each, and knows when its examples are old."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from lrsa_lit.data import Articles, FactsInText, NthOfMany, Passkey, QADataModule, Ruler13
from lrsa_lit.data.collate import learnt_spans
from lrsa_lit.data.fingerprint import source_files
from lrsa_lit.data.prompts import TooLong, render_passage
from lrsa_lit.data.records import QARecord, check_record
from lrsa_lit.data.word_tasks import WORD_TASKS
from lrsa_lit.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
UNTITLED = (FactsInText, NthOfMany, Passkey, Ruler13)
"""Their prompts show no titles."""
GROWN = {*WORD_TASKS, "cwe", "fwe"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRSA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(make, cache):
    data = make(tokenizer=TOKENIZER)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def records(data):
    """The records of each split; a mixture has those of its parts."""
    if type(data).records is QADataModule.records:
        pytest.skip("its records are those of other data sets")
    return {split: list(data.records(split)) for split in data.splits()}


@pytest.fixture(scope="module")
def pairs(data, records):
    """Each record and its example, as far as they fit."""
    found = [(record, data.to_example(record)) for split in records for record in records[split]]
    return [(record, example) for record, example in found if not isinstance(example, TooLong)]


def shown(ids):
    return TOKENIZER.decode(ids)


def test_records_are_valid(records):
    for split, found in records.items():
        assert found, split
        assert len({record.id for record in found}) == len(found)
        for record in found:
            record.check_texts()
            if not isinstance(record, QARecord):
                continue
            check_record(record)
            assert QARecord.from_dict(json.loads(json.dumps(asdict(record)))) == record


def test_no_question_is_in_two_splits(records):
    questions = {split: {replace(record, id="") for record in found} for split, found in records.items()}
    for split in questions:
        others = set().union(*(questions[other] for other in questions if other != split))
        assert questions[split].isdisjoint(others), split


def test_every_record_that_fits_is_an_example(data, records):
    for split, found in records.items():
        fitting = [record.id for record in found if not isinstance(data.to_example(record), TooLong)]
        assert list(data.open_split(split)["id"]) == fitting


def test_evidence_is_where_the_spans_say(data, pairs):
    untitled = isinstance(data, UNTITLED)
    for record, example in pairs:
        if not isinstance(record, QARecord):
            assert example["gold_spans"] == example["answer_spans"] == []
            continue
        supporting = [passage for passage in record.passages if passage.title in record.supporting_titles]
        gold = [passage.text.strip() if untitled else render_passage(passage) for passage in supporting]
        spans = example["gold_spans"]
        assert sorted(shown(example["input_ids"][slice(*span)]).strip() for span in spans) == sorted(gold)
        assert all(0 <= start < end <= example["prompt_length"] for start, end in spans)
        for start, end in example["answer_spans"]:
            found = shown(example["input_ids"][start:end]).strip().lower()
            assert found in [answer.strip().lower() for answer in record.answers]
            assert any(first <= start and end <= last for first, last in spans)


def test_contexts_hold_the_evidence_and_end_before_the_question(data, pairs):
    for record, example in pairs:
        turn = example.get("first_turn", example["prompt_length"])
        context = example.get("context_length", turn)
        assert 1 <= context <= turn <= example["prompt_length"]
        assert all(stop <= context for _, stop in example["gold_spans"])
        if span := example.get("context_span"):
            assert all(span[0] <= start and stop <= span[1] for start, stop in example["gold_spans"])
        if isinstance(record, QARecord) and not isinstance(data, Articles):
            assert record.questions[0].strip() in shown(example["input_ids"][context:turn])


def test_nothing_is_cut(data, pairs):
    """What grows with the budget replaces that of the record by as much as fits; tests/data has more about it."""
    if isinstance(data, Articles):
        pytest.skip("its examples are the beginnings of texts")
    assert pairs
    for record, example in pairs:
        ids, length = example["input_ids"], example["prompt_length"]
        prompt = shown(ids[:length])
        assert len(ids) <= data.max_tokens
        if not isinstance(record, QARecord):
            # What they learn is for tests of their own.
            spans = learnt_spans(example)
            assert all(0 <= start < end <= len(ids) for start, end in spans)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            continue
        if record.task not in GROWN:
            assert all(passage.text.strip() in prompt for passage in record.passages)
        assert record.question.strip() in prompt
        assert shown(ids[length:]).strip() == record.target + TOKENIZER.eos_token
        assert list(example["answers"]) == list(record.answers)


def test_any_order_of_splits_gives_the_same_examples(data, make, tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path))
    again = make(tokenizer=tiny_tokenizer())
    assert again.fingerprint == data.fingerprint
    for split in reversed(again.splits()):
        again.prepare_split(split)
        assert again.open_split(split).to_list() == data.open_split(split).to_list()


BUILD = """
import hashlib, json, sys
from pkgutil import resolve_name
from lrsa_lit.models.tiny import tiny_tokenizer

def built(cls, init_args):
    data = cls(tokenizer=tiny_tokenizer(), max_tokens=2048, **init_args)
    data.prepare_data()
    rows = [data.open_split(split).to_list() for split in data.splits()]
    return data.fingerprint, hashlib.sha256(json.dumps(rows).encode()).hexdigest()

if __name__ == "__main__":
    print(json.dumps([built(resolve_name(path), init_args) for path, init_args in json.load(sys.stdin)[::-1]]))
"""


def test_another_process_gives_the_same_examples(data_sets, tmp_path, monkeypatch):
    """In another order, and with other hashes of strings."""
    names = {"__name__": "build"}
    exec(BUILD, names)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "here"))
    expected = [list(names["built"](cls, init_args)) for cls, init_args in data_sets]
    given = json.dumps([(f"{cls.__module__}:{cls.__qualname__}", init_args) for cls, init_args in data_sets])
    there = {"LRSA_CACHE_DIR": str(tmp_path / "there"), "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BUILD]
    run = subprocess.run(command, input=given, env=os.environ | there, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)[::-1] == expected


def test_what_decides_the_examples_decides_the_cache(records, data, make):
    for change in ({"max_tokens": 2047}, {"seed": 1}, {"limit": {"test": 1}}):
        assert make(tokenizer=TOKENIZER, **change).fingerprint != data.fingerprint


def test_the_cache_sees_an_edited_file(data, make):
    for path in make.files:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        try:
            assert make(tokenizer=TOKENIZER).fingerprint != data.fingerprint, path.name
        finally:
            path.write_bytes(content)
    assert make(tokenizer=TOKENIZER).fingerprint == data.fingerprint


def test_the_cache_sees_edited_code(data):
    for base in type(data).__mro__:
        if issubclass(base, QADataModule):
            module = sys.modules[base.__module__]
            assert any(path.samefile(module.__file__) for path in source_files(base.__module__))
