"""A filter shortens a context and nothing else, says what became of each sentence, and is in the key of the cache."""

import json
from dataclasses import replace

import pytest
from data_files import FILES
from filter_files import SUMMARISED
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lrsa_lit.data import QAFiles
from lrsa_lit.data.filters import Budgeted, ContextFilter
from lrsa_lit.data.prompts import PROMPT, Prompt, TooLong, encode
from lrsa_lit.data.qa_tasks import PROMPT as NUMBERED
from lrsa_lit.data.records import Passage, QARecord, check_record
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PIECES = Prompt("{context}{input}", heading=None)
WORDS = st.sampled_from(["Ada", "met", "the", "café", "not", "in", "1815", "U.S.", "well-known", "<s>", "rain", "🙂"])
SENTENCE = st.lists(WORDS, min_size=1, max_size=7).map(lambda words: " ".join(words) + ". ")
PASSAGE = st.tuples(st.sampled_from(["", "Ada", "Isk", "Isk"]), st.lists(SENTENCE, min_size=1, max_size=4))
CONTEXTS = st.lists(PASSAGE, min_size=1, max_size=5)


@st.composite
def records(draw):
    drawn = draw(CONTEXTS)
    before = draw(st.sampled_from(["", "\n", " "]))
    passages = tuple(Passage(title, before + "".join(text)) for title, text in drawn)
    passages += draw(st.sampled_from([(), (Passage("Isk", SUMMARISED),)]))
    gold = draw(st.lists(st.sampled_from(range(len(drawn))), max_size=2, unique=True))
    record = QARecord(
        id=draw(st.sampled_from(["a", "b"])),
        passages=passages,
        question=draw(st.sampled_from(["Whom met Ada?", "When?"])),
        answers=("1815", "the rain"),
        supporting_titles=tuple(dict.fromkeys(drawn[place][0] for place in gold)),
        supporting_sentences=tuple(Passage(drawn[place][0], drawn[place][1][-1].strip()) for place in gold),
    )
    check_record(record)
    return record


@pytest.fixture(scope="module")
def shortens(context_filter):
    context_filter.use(TOKENIZER)
    return context_filter


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(item in rest for item in part)


prompts = pytest.mark.parametrize("prompt", [PROMPT, NUMBERED, PIECES], ids=["titles", "numbers", "pieces"])


@prompts
def test_only_the_context_changes_and_titles_follow(shortens, prompt):
    @given(records())
    @settings(max_examples=20)
    def holds(record):
        shorter = shortens.apply(record, prompt)
        emptied = {"passages": (), "supporting_titles": (), "supporting_sentences": ()}
        assert replace(shorter, **emptied) == replace(record, **emptied)
        titles = [passage.title for passage in shorter.passages]
        assert is_subsequence(titles, [passage.title for passage in record.passages])
        assert all(passage.text.strip() for passage in shorter.passages)
        assert list(shorter.supporting_titles) == [title for title in record.supporting_titles if title in titles]
        assert is_subsequence(shorter.supporting_sentences, record.supporting_sentences)
        if shorter.passages:
            check_record(shorter)
        else:
            assert not isinstance(encode(shorter, TOKENIZER, 4096, prompt), TooLong)

    holds()


@prompts
def test_each_sentence_is_accounted_for(shortens, prompt):
    @given(records())
    @settings(max_examples=20)
    def holds(record):
        found = shortens.filtered(record, prompt)
        assert found.source == record
        assert is_subsequence(found.kept, sorted([*found.kept, *found.dropped], key=lambda each: each.passage))
        for place, passage in enumerate(record.passages):
            of = [each for each in (*found.kept, *found.dropped) if each.passage == place]
            assert sum(len(each.text) for each in of) == len(passage.text)
            assert sum(each.first for each in of) <= 1
            assert all(each.title == passage.title and each.text in passage.text for each in of)
        left = " ".join(passage.text for passage in found.record.passages)
        assert all(sentence.text.strip() in left for sentence in found.kept)
        shown = [prompt.between.join(prompt.shown(each.passages)) for each in (record, found.record)]
        assert [found.tokens, found.tokens_left] == [len(TOKENIZER(text)["input_ids"]) for text in shown]
        counts = found.counts()
        for name in ("context tokens", "sentences", "supporting titles", "supporting sentences", "answers"):
            assert 0 <= counts[f"{name} left"] <= counts[name]

    holds()


@prompts
def test_no_more_stays_than_the_budget_allows(shortens, prompt):
    if not isinstance(shortens, Budgeted):
        pytest.skip("it has no budget")

    @given(records(), st.integers(1, 300))
    @settings(max_examples=25)
    def holds(record, tokens):
        narrow = replace(shortens, tokens=tokens)
        narrow.use(TOKENIZER)
        found = narrow.filtered(record, prompt)
        assert found.tokens_left <= tokens or getattr(shortens, "rule", "strict") == "published"
        if found.tokens <= tokens:
            assert found.record == record
            assert not found.dropped

    holds()


def test_the_same_stays_each_time(shortens):
    again = ContextFilter.from_dict(json.loads(json.dumps(shortens.to_dict())))
    assert again == shortens
    again.use(TOKENIZER)

    @given(records())
    @settings(max_examples=15)
    def holds(record):
        assert again.apply(record) == shortens.apply(record) == shortens.apply(record)

    holds()


def test_only_a_filter_that_asks_depends_on_the_question(shortens):
    @given(records())
    @settings(max_examples=15)
    def holds(record):
        unasked = replace(record, question=" ")
        if shortens.asks:
            with pytest.raises(UserError, match="has none; use another filter, such as Truncate"):
                shortens.apply(unasked)
        else:
            assert shortens.apply(unasked).passages == shortens.apply(record).passages

    holds()


def test_settings_name_it_and_decide_the_cache(shortens, tmp_path, monkeypatch):
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    files = FILES["QAFiles"](tmp_path)
    parser = ArgumentParser()
    parser.add_subclass_arguments(QAFiles, "data")
    settings_of = {"class_path": "lrsa_lit.data.QAFiles", "init_args": {**files, "filter": shortens.to_dict()}}
    data = parser.instantiate_classes(parser.parse_object({"data": settings_of})).data
    assert data.filter == shortens
    data.tokenizer = TOKENIZER
    plain = QAFiles(**files, tokenizer=TOKENIZER)
    assert data.fingerprint != plain.fingerprint
    for each in (data, plain):
        each.prepare_data()
        each.setup()
    found, whole = data.open_split("test"), plain.open_split("test")
    assert found["answers"] == whole["answers"]
    report = data.report["test"]
    assert report["filtered"] == report["kept"] == len(found)
    # The prompt is the context and what stands around it.
    bare = [len(encode(replace(each, passages=()), TOKENIZER, 4096)["input_ids"]) for each in data.records("test")]
    assert sum(map(len, found["input_ids"])) <= sum(map(len, whole["input_ids"]))
    assert report["context tokens left"] <= sum(map(len, found["input_ids"])) - sum(bare) + 2 * len(bare)


def test_other_settings_are_another_cache(shortens, tmp_path, monkeypatch):
    if not isinstance(shortens, Budgeted):
        pytest.skip("its settings are its own")
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    files = FILES["QAFiles"](tmp_path)
    each = (shortens, replace(shortens, tokens=40), replace(shortens, kept=0.125))
    assert len({QAFiles(**files, tokenizer=TOKENIZER, filter=one).fingerprint for one in each}) == 3


def test_bounds_are_said_in_one_line(shortens):
    if not isinstance(shortens, Budgeted):
        pytest.skip("it has no budget")
    for wrong in ({"kept": 0.0}, {"kept": 1.5}, {"kept": float("nan")}, {"tokens": 0}, {"tokens": True}, {"kept": "x"}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}: ") as refused:
            replace(shortens, **wrong)
        assert "\n" not in str(refused.value)
