"""A user error is one line, made of what is wrong, what was given and what is allowed."""

import pickle
from pathlib import Path

import pytest

from lrsa_lit.errors import UserError, under


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("top_k", 9, "an integer <= 4"), "top_k: 9 is not allowed; it must be an integer <= 4"),
        (UserError("top_k", "9", "an integer"), "top_k: '9' is not allowed; it must be an integer"),
        (UserError("top_k", None, "an integer"), "top_k: it must be an integer"),
        (UserError("top_k", 0), "top_k: 0 is not allowed"),
        (UserError("train", Path("x"), reason="is a folder", hint="name a file"), "train: x is a folder; name a file"),
        (UserError("a.jsonl, line 2", reason="not valid JSON"), "a.jsonl, line 2: not valid JSON"),
        (UserError("the device is out of memory"), "the device is out of memory"),
    ],
)
def test_the_line(error, line):
    assert str(error) == line
    # As the processes of a run hand it on: whole, or its line alone.
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, again.value, again.allowed, str(again)) == (error.field, error.value, error.allowed, line)
    assert (UserError(line).field, str(UserError(line))) == (error.field, line)


def test_the_arguments_of_a_part_are_named_after_it():
    with pytest.raises(UserError) as caught, under("model"), under("lrsa"):
        raise UserError("top_k", 9, "an integer <= 4")
    assert caught.value.field == "model.lrsa.top_k"
    assert str(caught.value) == "model.lrsa.top_k: 9 is not allowed; it must be an integer <= 4"
