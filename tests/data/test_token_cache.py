import contextlib
import logging
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from helpers import refused

from lrsa_lit.data import token_cache
from lrsa_lit.data.prompts import Example
from lrsa_lit.errors import UserError

EXAMPLE = Example(
    id="é",
    input_ids=[5, 6, 7],
    prompt_length=2,
    gold_spans=[(0, 1), (1, 2)],
    answer_spans=[],
    answers=["a", "b"],
    match="all",
    task="t",
    question="q?",
    subject="s",
    context_length=1,
    first_turn=1,
    source_length=4,
    context_span=(0, 1),
    learnt=[[2, 3]],
)


def test_examples_and_report_come_back(tmp_path):
    token_cache.build(tmp_path / "key" / "train", [EXAMPLE, EXAMPLE], Counter(kept=2))
    rows, report = token_cache.load(tmp_path / "key" / "train")
    assert rows[1] == {**EXAMPLE, "rejected": [], "gold_spans": [[0, 1], [1, 2]], "context_span": [0, 1]}
    assert token_cache.sizes(rows) == [(3, 1, 0, 1)] * 2
    assert (len(rows), report) == (2, Counter(kept=2))


def test_lengths_are_those_of_what_trains(tmp_path):
    longer = EXAMPLE | {"rejected": [7] * 9}
    token_cache.build(tmp_path / "train", [EXAMPLE, longer], Counter())
    rows, _ = token_cache.load(tmp_path / "train")
    own, prompt = len(EXAMPLE["input_ids"]), EXAMPLE["prompt_length"]
    assert token_cache.lengths(rows) == [own, own]
    assert token_cache.longest(rows) == [own, prompt + 9]
    assert [size.sequences for size in token_cache.sizes(rows)] == [[own], [own, prompt + 9]]


def test_all_of_the_first_turn_is_context_unless_an_example_says_less(tmp_path):
    missing = ("context_length", "first_turn", "context_span")
    short = {name: value for name, value in EXAMPLE.items() if name not in missing}
    token_cache.build(tmp_path / "train", [short, short | {"first_turn": 1}], Counter())
    rows, _ = token_cache.load(tmp_path / "train")
    assert (rows["context_length"][:], rows["first_turn"][:]) == ([2, 1], [2, 1])
    assert (rows["context_span"][:], token_cache.sizes(rows)) == ([[], []], [(3, 1, 0, None)] * 2)


def test_nothing_is_left_of_a_build_that_failed(tmp_path):
    def broken() -> Iterator[Example]:
        yield EXAMPLE
        assert len(list(tmp_path.iterdir())) == 1
        raise UserError("broken")

    with pytest.raises(UserError, match="broken"):
        token_cache.build(tmp_path / "train", broken(), Counter())
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_build_is_not_taken_for_a_split(tmp_path):
    def watched() -> Iterator[Example]:
        assert not token_cache.is_built(tmp_path / "train")
        yield EXAMPLE
        assert not token_cache.is_built(tmp_path / "train")

    token_cache.build(tmp_path / "train", watched(), Counter())
    assert token_cache.is_built(tmp_path / "train")


def test_whoever_finishes_first_wins(tmp_path):
    def overtaken() -> Iterator[Example]:
        token_cache.build(tmp_path / "train", [EXAMPLE], Counter(kept=1))
        yield EXAMPLE
        yield EXAMPLE

    token_cache.build(tmp_path / "train", overtaken(), Counter(kept=2))
    rows, report = token_cache.load(tmp_path / "train")
    assert (len(rows), report["kept"]) == (1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_an_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with refused("LRSA_CACHE_DIR", reason=str(tmp_path / "file" / "train")):
        token_cache.build(tmp_path / "file" / "train", [EXAMPLE], Counter())


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file may be larger than so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("count", [1, 1000], ids=["at the end", "midway"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, count):
    token_cache.build(tmp_path / "whole", [EXAMPLE] * count, Counter())
    needed = (tmp_path / "whole" / "examples.arrow").stat().st_size
    for size in (0, needed // 2, needed - 1):
        with room(size), refused("LRSA_CACHE_DIR"):
            token_cache.build(tmp_path / "train", [EXAMPLE] * count, Counter())
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_an_error_of_the_source_is_not_blamed_on_the_cache(tmp_path):
    def gone() -> Iterator[Example]:
        yield EXAMPLE
        raise FileNotFoundError("source")

    with pytest.raises(FileNotFoundError, match="source"):
        token_cache.build(tmp_path / "train", gone(), Counter())


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("name", ["examples.arrow", "report.json"])
@pytest.mark.parametrize(
    "harm", [flipped, lambda data: data[:-1], lambda data: b"", None], ids=["flipped", "cut", "empty", "missing"]
)
def test_damage_is_noticed_and_mended(tmp_path, caplog, name, harm):
    folder = tmp_path / "train"
    token_cache.build(folder, [EXAMPLE] * 3, Counter(kept=3))
    path = folder / name
    if callable(harm):
        path.write_bytes(harm(path.read_bytes()))
    else:
        path.unlink()
    assert not token_cache.is_built(folder)
    with refused("LRSA_CACHE_DIR", folder, reason=f"damaged ({name} "):
        token_cache.load(folder)
    with caplog.at_level(logging.WARNING, "lrsa_lit.data"):
        token_cache.build(folder, [EXAMPLE] * 3, Counter(kept=3))
    assert len(caplog.records) == 1
    rows, report = token_cache.load(folder)
    assert (len(rows), report, rows[0]["input_ids"]) == (3, Counter(kept=3), [5, 6, 7])
    assert [each.name for each in tmp_path.iterdir()] == ["train"]


def test_what_a_killed_build_has_left_is_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from lrsa_lit.io import partial_folder\n"
        "with partial_folder(Path(sys.argv[1])) as partial: (partial / 'x').touch(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "key" / "train")], check=False).returncode == 9
    assert len(list((tmp_path / "key").iterdir())) == 1
    (tmp_path / "file").touch()
    token_cache.remove_abandoned(tmp_path / "none")
    token_cache.remove_abandoned(tmp_path)
    assert list((tmp_path / "key").iterdir()) == []
