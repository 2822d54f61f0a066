"""Whole articles as texts."""

import json

import pytest

from lrsa_lit.data import Articles
from lrsa_lit.data.prompts import TooLong
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer


@pytest.fixture
def source(tmp_path):
    def article(name, paragraphs):
        qas = [{"id": f"{name}-q", "question": "Q?", "answers": [{"text": "fact"}], "is_impossible": False}]
        texts = [{"context": f"{name} fact {number}. " * 5, "qas": qas if number == 0 else []}
                 for number in range(paragraphs)]  # fmt: skip
        return {"title": name, "paragraphs": texts}

    content = {"data": [article("Long", 6), article("Longer", 9), article("Short", 1)]}
    (tmp_path / "squad.json").write_text(json.dumps(content))
    return str(tmp_path / "squad.json")


def test_an_article_is_text_alone(source):
    made = Articles(source=source, sha256=None, max_tokens=200, scored_from=50, val_fraction=0.0)
    made.tokenizer = tokenizer = tiny_tokenizer()
    records = {record.id: record for split in ("train", "test") for record in made.records(split)}
    example = made.to_example(records["Long-q"])
    assert (len(example["input_ids"]), example["prompt_length"]) == (200, 50)
    text = tokenizer.decode(example["input_ids"])
    assert text.startswith("Long (1)\nLong fact 0. Long fact 0.")
    assert "Q?" not in text
    assert isinstance(made.to_example(records["Short-q"]), TooLong)


def test_there_must_be_something_to_score(source):
    with pytest.raises(UserError) as error:
        Articles(source=source, sha256=None, max_tokens=200, scored_from=200)
    assert "scored_from" in str(error.value)
