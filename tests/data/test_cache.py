import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrsa_lit.data import cache
from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

EXAMPLE = Example(
    id="é",
    input_ids=[5, 6, 7],
    prompt_length=2,
    gold_spans=[(0, 1), (1, 2)],
    answer_spans=[],
    answers=["a", "b"],
    match="all",
    task="t",
    subject="s",
)


def test_examples_and_report_come_back(tmp_path: Path):
    cache.build(tmp_path / "key" / "train", [EXAMPLE, EXAMPLE], Counter(kept=2))
    rows, report = cache.load(tmp_path / "key" / "train")
    assert rows[1] == {**EXAMPLE, "gold_spans": [[0, 1], [1, 2]]}
    assert (len(rows), report) == (2, Counter(kept=2))


def test_nothing_is_left_of_a_build_that_failed(tmp_path: Path):
    def broken() -> Iterator[Example]:
        yield EXAMPLE
        assert len(list(tmp_path.iterdir())) == 1
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        cache.build(tmp_path / "train", broken(), Counter())
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_build_is_not_taken_for_a_split(tmp_path: Path):
    def watched() -> Iterator[Example]:
        assert not cache.is_built(tmp_path / "train")
        yield EXAMPLE
        assert not cache.is_built(tmp_path / "train")

    cache.build(tmp_path / "train", watched(), Counter())
    assert cache.is_built(tmp_path / "train")


def test_whoever_finishes_first_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def overtaken() -> Iterator[Example]:
        cache.build(tmp_path / "train", [EXAMPLE], Counter(kept=1))
        yield EXAMPLE
        yield EXAMPLE

    with caplog.at_level(logging.INFO, "lrsa_lit.data"):
        cache.build(tmp_path / "train", overtaken(), Counter(kept=2))
    rows, report = cache.load(tmp_path / "train")
    assert (len(rows), report["kept"]) == (1, 1)
    assert "another process" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_an_unwritable_cache_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        cache.build(tmp_path / "file" / "train", [EXAMPLE], Counter())
    assert str(error.value).startswith(f"LRSA_CACHE_DIR: cannot write {tmp_path / 'file' / 'train'} (")
    assert "\n" not in str(error.value)


def test_the_digest_depends_on_every_part_but_not_on_order(monkeypatch: pytest.MonkeyPatch):
    first = cache.digest({"a": 1, "b": [2]})
    assert first == cache.digest({"b": [2], "a": 1})
    assert first != cache.digest({"a": 1, "b": [3]})
    monkeypatch.setattr(cache, "CODE_VERSION", cache.CODE_VERSION + 1)
    assert first != cache.digest({"a": 1, "b": [2]})


def test_a_tokenizer_is_known_by_what_decides_its_tokens():
    first, second = tiny_tokenizer(), tiny_tokenizer()
    second(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert cache.tokenizer_fingerprint(first) == cache.tokenizer_fingerprint(second)
    second.chat_template += " "
    assert cache.tokenizer_fingerprint(first) != cache.tokenizer_fingerprint(second)
    third = tiny_tokenizer()
    third.add_tokens(["token"])
    assert cache.tokenizer_fingerprint(first) != cache.tokenizer_fingerprint(third)
