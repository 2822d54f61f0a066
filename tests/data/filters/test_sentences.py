import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.filters.sentences import pieces_of, sentences_of, split_sentences
from lrsa_lit.data.records import Passage
from lrsa_lit.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.text(st.sampled_from("aB .!?\n\t\"'(1é🙂日。\u2028\u00a0\r"), max_size=60)


@given(TEXTS)
def test_sentences_are_the_text_and_none_is_blank_beside_others(text):
    found = split_sentences(text)
    assert "".join(found) == text
    assert all(sentence.strip() for sentence in found) or len(found) <= 1


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("He lives in the U.S. with Dr. Smith. She left.", ["He", "She"]),
        ("J. R. R. Tolkien wrote it in 3.5 years. It sold.", ["J.", "It"]),
        ("A heading\nThe text. More", ["A", "The", "More"]),
        ("\n\n One.\n\n\nTwo.", ["One", "Two"]),
        ("No end", ["No"]),
    ],
)
def test_sentences_end_where_readers_end_them(text, starts):
    found = split_sentences(text)
    assert len(found) == len(starts)
    assert all(sentence.strip().startswith(start) for sentence, start in zip(found, starts, strict=True))


def test_a_sentence_knows_its_passage():
    found = sentences_of([Passage("Isk", "Long. Wide."), Passage("", ""), Passage("Orda", "Deep.")])
    assert [(each.passage, each.first, each.titled) for each in found] == [
        (0, True, "Isk Long."),
        (0, False, "Isk Wide."),
        (2, True, "Orda Deep."),
    ]


@given(TEXTS, st.integers(1, 12))
def test_pieces_are_the_text_and_as_long_as_they_may_be(text, most):
    found = list(pieces_of(text, TOKENIZER, most))
    assert "".join(found) == text
    # A character may have four tokens, which are bytes here.
    assert all(piece and len(piece.encode()) <= max(most, 4) for piece in found)


def test_pieces_end_between_words():
    assert list(pieces_of("one two three", TOKENIZER, 8)) == ["one two ", "three"]
    assert list(pieces_of("longer", TOKENIZER, 4)) == ["long", "er"]
