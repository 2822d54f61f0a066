"""Text as its tokens come: whole characters, nothing behind a stop, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.serving.text_stream import TextStream

TOKENIZER = tiny_tokenizer()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def pieces(ids, stops=()):
    """What is handed out for each token, and at the end; whether a stop was found."""
    stream, found = TextStream(TOKENIZER, stops), []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.end()], stream


@given(st.text(max_size=30))
def test_nothing_is_lost_and_characters_come_whole(text):
    found, stream = pieces(ids_of(text))
    assert "".join(found) == text
    assert stream.tokens == len(ids_of(text))
    assert all("\ufffd" not in piece for piece in found[:-1]) or "\ufffd" in text


@given(st.lists(st.integers(3, 258), max_size=20))
def test_any_tokens_give_what_the_tokenizer_gives(ids):
    assert "".join(pieces(ids)[0]) == TOKENIZER.decode(ids)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_it_ends_before_the_first_stop(text, stops):
    found, stream = pieces(ids_of(text), stops)
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    assert stream.stopped == bool(ends)
    seen = text[: min(ends)] if ends else text
    expected = min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))
    assert "".join(found) == text[:expected]


@pytest.mark.parametrize("text", ["xx<sto", "xx<", "xx<stox<stop"])
def test_what_may_be_a_stop_is_held_back(text):
    stream = TextStream(TOKENIZER, ["<stop>"])
    shown = "".join(stream.push(token) for token in ids_of(text))
    assert text.startswith(shown)
    assert "<stop>".startswith(text[len(shown) :])
    assert shown + stream.end() == text
