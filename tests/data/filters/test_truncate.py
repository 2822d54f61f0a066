import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.filters import Truncate
from lrsa_lit.data.prompts import Prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

BARE = Prompt("{context}{input}", heading=None)


def record(*texts):
    return QARecord("r", tuple(Passage(f"T{n}", text) for n, text in enumerate(texts)), "Q?", ("a",))


def texts_left(shortens, *texts, prompt=BARE, tokenizer=None):
    shortens.use(tokenizer or tiny_tokenizer())
    return [passage.text for passage in shortens.apply(record(*texts), prompt).passages]


@pytest.mark.parametrize(
    ("cut", "left"),
    [("middle", ["0123", "def"]), ("end", ["0123456"]), ("beginning", ["9", "abcdef"])],
)
def test_what_stays_of_bytes(cut, left):
    assert texts_left(Truncate(tokens=7, cut=cut), "0123456789", "abcdef") == left


def test_a_passage_can_lose_its_own_middle():
    assert texts_left(Truncate(tokens=5), "0123456789") == ["01289"]
    assert texts_left(Truncate(tokens=14), "0123456789", "abcdef") == ["01234569", "abcdef"]


def test_titles_count():
    assert texts_left(Truncate(tokens=20, cut="end"), "0123456789", "abcdef", prompt=Prompt("{context}{input}")) == [
        "0123456789",
    ]


def test_what_is_cut_is_refused():
    with pytest.raises(UserError, match=r"^cut: 'front' is not allowed; it must be middle, end or beginning$"):
        Truncate(cut="front")


@given(st.lists(st.text(st.sampled_from("Cde .\n"), min_size=1, max_size=30), min_size=1, max_size=4), st.data())
def test_the_budget_holds_where_tokens_merge(merging, texts, data):
    shortens = Truncate(tokens=data.draw(st.integers(1, 30)), cut=data.draw(st.sampled_from(["middle", "end"])))
    shortens.use(merging)
    assert shortens.filtered(record(*texts), Prompt("{context}{input}")).tokens_left <= shortens.tokens
