"""Summaries in the place of passages, and all passages that contexts show."""

import json
from collections import Counter
from dataclasses import asdict

import pytest
from data_files import hotpotqa
from helpers import refused

from lrsa_lit.data import ChatFiles, HotpotQA, Mixture, QAFiles
from lrsa_lit.data.filters import Summaries, Truncate
from lrsa_lit.data.filters.contexts import contexts
from lrsa_lit.data.filters.filter_measures import context_measures
from lrsa_lit.data.prompts import PROMPT
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.summary_file import line_of
from lrsa_lit.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FERRY = "The ferry leaves at noon. It is red. It rains."
RECORD = QARecord(
    id="q",
    passages=(Passage("Ferry", FERRY), Passage("Oslo", "Oslo is far."), Passage("", "Nothing else.")),
    question="When does the ferry leave?",
    answers=("noon",),
    supporting_titles=("Ferry",),
    supporting_sentences=(Passage("Ferry", "The ferry leaves at noon."),),
)


def written(tmp_path, summaries, by="x"):
    lines = [line_of(text, by, summary) for text, summary in summaries.items()]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Summaries(str(tmp_path / "s.jsonl"))
    found.use(TOKENIZER)
    return found


def test_a_summary_takes_the_place_of_its_passage_alone(tmp_path):
    found = written(tmp_path, {FERRY: "It is red. It rains, they say.", "Oslo is far.": ""}).filtered(RECORD)
    assert found.record.passages == (Passage("Ferry", "It is red. It rains, they say."), *RECORD.passages[1:])
    assert found.record.supporting_titles == ("Ferry",)
    assert found.record.supporting_sentences == ()
    assert [sentence.text.strip() for sentence in found.kept] == ["It is red.", "Oslo is far.", "Nothing else."]
    assert [sentence.text.strip() for sentence in found.dropped] == ["The ferry leaves at noon.", "It rains."]
    counts = found.counts()
    assert (counts["passages"], counts["passages without a summary"]) == (3, 2)
    assert context_measures(Counter(counts))["without_summary"] == pytest.approx(2 / 3)
    assert (counts["answers"], counts["answers left"]) == (1, 0)
    assert (counts["supporting sentences"], counts["supporting sentences left"]) == (1, 0)
    assert counts["context tokens left"] < counts["context tokens"]


def test_neither_question_nor_title_matters(tmp_path):
    summaries = written(tmp_path, {FERRY: "Red."})
    other = QARecord("r", (Passage("Another", FERRY),), "Is it?", ("no",))
    assert summaries.apply(other).passages == (Passage("Another", "Red."),)
    assert not summaries.asks


def test_a_changed_file_is_read_again_and_is_in_the_key(tmp_path):
    first = written(tmp_path, {FERRY: "Red."})
    key, sources = first.key, first.sources()
    second = written(tmp_path, {FERRY: "It is red."})
    assert second.key == key
    assert second.sources() != sources
    assert first.apply(RECORD).passages[0].text == "It is red."


@pytest.mark.parametrize(
    ("content", "field", "said"),
    [
        ("", "map", "has no summaries"),
        ('{"passage": "a", "by": "x"}\n', "line 1", "is missing"),
        ('{"passage": "a", "by": "x", "summary": "s"}\n{"passage": "b", "by": "y", "summary": "s"}\n', "line 2",
         "another model, or other settings"),
        ("[]\n", "line 1", "is list"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_summaries_is_refused(tmp_path, content, field, said):
    (tmp_path / "s.jsonl").write_text(content)
    with refused(field if field == "map" else f"{tmp_path}/s.jsonl, {field}", reason=said):
        Summaries(str(tmp_path / "s.jsonl"))
    with refused("map", reason="not an existing file"):
        Summaries(str(tmp_path / "none.jsonl"))


def test_contexts_are_those_that_prompts_show(tmp_path):
    data = HotpotQA(**hotpotqa(tmp_path), max_tokens=500, tokenizer=TOKENIZER, filter=Truncate(kept=0.5))
    shown = list(contexts(data, "train"))
    assert len(shown) == len(data.records("train"))
    assert isinstance(data.filter, Truncate)
    data.filter = None
    for record, prompt in shown:
        assert len(record.passages) > 2
        assert prompt is PROMPT
        (bare,) = [each for each in data.records("train") if each.id == record.id]
        text = TOKENIZER.decode(data.to_example(bare)["input_ids"])
        assert all(passage.text in text for passage in record.passages)


def test_contexts_go_as_far_as_asked_and_leave_out_what_is_too_long(tmp_path):
    long = asdict(RECORD) | {"id": "long", "passages": [{"title": "Ferry", "text": FERRY * 30}]}
    rows = [asdict(RECORD), long, asdict(RECORD) | {"id": "r"}, asdict(RECORD) | {"id": "s"}]
    rows[1]["supporting_sentences"] = []
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(tmp_path / "q.jsonl"), "tokenizer": TOKENIZER, "max_tokens": 600}
    assert [record.id for record, _ in contexts(QAFiles(**files), "train")] == ["q", "r", "s"]
    assert [record.id for record, _ in contexts(QAFiles(**files, limit={"train": 2}), "train")] == ["q", "r"]
    assert not list(contexts(QAFiles(**files), "test"))
    both = Mixture({"a": QAFiles(**files), "b": QAFiles(**files)}, {"a": 1.0, "b": 1.0}, tokenizer=TOKENIZER)
    assert [record.id for record, _ in contexts(both, "train")] == ["q", "r", "s"] * 2


def test_chats_have_no_contexts(tmp_path):
    (tmp_path / "c.jsonl").write_text("{}")
    with refused("data", "ChatFiles"):
        list(contexts(ChatFiles(train=str(tmp_path / "c.jsonl")), "train"))
