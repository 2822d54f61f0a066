import importlib.util
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.filters import POSPriorityChunks
from lrsa_lit.data.filters.pos_priority import NEGATIONS, PRIORITY, allocated, chunk_scores, kept_words
from lrsa_lit.data.filters.word_tags import Word, tagged
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

RECORDED = json.loads((Path(__file__).parents[2] / "vectors/systems/languashrink.json").read_text())
CHUNKS = [[Word(*word) for word in sentence] for sentence in RECORDED["sentences"]]


def test_the_weights_are_the_recorded_ones():
    assert RECORDED["priority"] == PRIORITY
    assert set(RECORDED["negations"]) == NEGATIONS


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: str(case["rho"]))
def test_chunks_keep_the_recorded_words(case):
    words = max(1, math.floor(case["rho"] * case["words"] + 0.5))
    scores = chunk_scores(CHUNKS, RECORDED["alpha"])
    assert scores == pytest.approx(case["score"], abs=1e-9)
    counts = allocated([len(chunk) for chunk in CHUNKS], scores, words)
    assert counts == case["allocation"]
    kept = [kept_words(chunk, count) for chunk, count in zip(CHUNKS, counts, strict=True)]
    assert kept == case["kept"]
    text = " ".join(chunk[place].text for chunk, places in zip(CHUNKS, kept, strict=True) for place in places)
    assert text == case["text"]


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=6), st.integers(0, 60))
def test_all_words_are_given_out_and_no_chunk_gets_more_than_it_has(chunks, words):
    lengths, scores = [length for length, _ in chunks], [score for _, score in chunks]
    counts = allocated(lengths, scores, words)
    assert sum(counts) == min(words, sum(lengths))
    assert all(0 <= count <= length for count, length in zip(counts, lengths, strict=True))


def test_punctuation_alone_has_no_density():
    (score,) = chunk_scores([[Word("!", "PUNCT")]], 0.7)
    assert score == pytest.approx(0.3)


def test_tags_are_universal_ones():
    found = dict(tagged("Ada didn't pay $5 for 2,000 of the well-known maps at http://a.b, though."))
    expected = {"Ada": "PROPN", "n't": "PART", "$": "SYM", "2,000": "NUM", "of": "ADP", "the": "DET", "maps": "NOUN"}
    assert expected.items() <= found.items()
    assert (found["http://a.b"], found[","]) == ("X", "PUNCT")
    assert tagged(" \n") == []
    assert dict(tagged("It was tall"))["was"] == "AUX"


def record(*texts):
    return QARecord("r", tuple(Passage("", text) for text in texts), "Q?", ("a",))


def test_the_words_that_matter_stay_and_the_budget_holds():
    shortens = POSPriorityChunks(tokens=30)
    shortens.use(tiny_tokenizer())
    found = shortens.filtered(record("The Eiffel Tower was built in 1889 by the firm of Gustave Eiffel."))
    assert found.record.passages[0].text == "Eiffel Tower 1889 Gustave"
    assert found.tokens_left <= 30


def test_sentences_can_be_put_together():
    texts = record("The tower is tall. It is very old. The rain fell.")
    left = []
    for chunk_words in (None, 100):
        shortens = POSPriorityChunks(tokens=20, chunk_words=chunk_words)
        shortens.use(tiny_tokenizer())
        left.append(shortens.apply(texts).passages[0].text)
    assert left == ["tower tall old rain", "tower tall rain fell"]


def test_what_it_cannot_do_is_said_in_one_line(monkeypatch):
    shortens = POSPriorityChunks(tokens=3)
    shortens.use(tiny_tokenizer())
    with pytest.raises(UserError, match="record 'r' is in another script; use BM25"):
        shortens.apply(record("日本語の文章です。"))
    for wrong in ({"chunk_words": 0}, {"density": 1.5}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
            POSPriorityChunks(**wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        POSPriorityChunks()
    assert str(refused.value) == (
        "filter: 'POSPriorityChunks' needs textblob, which is not installed; pip install 'lrsa-lit[tagger]'"
    )
