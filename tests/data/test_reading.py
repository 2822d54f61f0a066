"""Every reader has the same tolerance, and says where a file is broken."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from data_helpers import Words
from helpers import refused
from pyarrow import parquet

from lrsa_lit.data import LongBench, QAFiles, SquadArticles
from lrsa_lit.data.hotpotqa import load_questions
from lrsa_lit.data.module import Split
from lrsa_lit.data.reading import parse_json, read_json, read_lines, read_rows
from lrsa_lit.data.records import Passage, QARecord, read_records
from lrsa_lit.errors import UserError
from lrsa_lit.models.tiny import tiny_tokenizer

GOOD: dict[str, Any] = {"id": "1", "passages": [{"title": "T", "text": "x"}], "question": "Q?", "answers": ["a"]}
LONG = {"input": "Q?", "context": "x", "answers": ["a"], "_id": "1"}
HOTPOT = {"_id": "1", "question": "Q?", "answer": "a", "supporting_facts": [["T", 0]], "context": [["T", ["x"]]]}
QUESTION = {"id": "1", "question": "Q?", "is_impossible": False, "answers": [{"text": "a"}]}
SQUAD = {"data": [{"title": "T", "paragraphs": [{"context": "x", "qas": [QUESTION]}]}]}


def of_files(path: Path) -> list[object]:
    return list(read_records(path))


def of_folder(path: Path) -> list[object]:
    return list(QAFiles(hub=str(path.parent), hub_splits={"train": "train"}).records("train"))


def of_longbench(path: Path) -> list[object]:
    return list(LongBench(train=str(path), tokenizer=tiny_tokenizer()).records("train"))


def of_hotpotqa(path: Path) -> list[object]:
    return load_questions(str(path), None)


def of_squad(path: Path) -> list[object]:
    return SquadArticles(source=str(path), sha256=None, val_fraction=0.0, test_fraction=0.0).articles("train")


Reader = Callable[[Path], list[object]]
READERS: list[tuple[Reader, str, object]] = [
    (of_files, "train.jsonl", GOOD),
    (of_files, "train.json", [GOOD]),
    (of_folder, "train.jsonl", GOOD),
    (of_folder, "train.json", [GOOD]),
    (of_longbench, "train.jsonl", LONG),
    (of_hotpotqa, "train.json", [HOTPOT]),
    (of_squad, "train.json", SQUAD),
]
every_reader = pytest.mark.parametrize(
    ("read", "name", "value"), READERS, ids=lambda value: getattr(value, "__name__", None)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@every_reader
def test_a_byte_order_mark_is_passed_over(folder: Path, read: Reader, name: str, value: object):
    path = folder / name
    path.write_text(json.dumps(value))
    plain = read(path)
    path.write_text("\ufeff" + json.dumps(value))
    assert read(path) == plain
    assert plain


def doubled(text: str) -> str:
    """The text with the key of the question twice in its object."""
    return text.replace('"Q?"', '"Q?", "question": "R?", "input": "R?"')


BROKEN: dict[str, tuple[Callable[[str], bytes], str]] = {
    "a key twice": (lambda text: doubled(text).encode(), "appears twice"),
    "half a character": (lambda text: text.replace("Q?", r"Q \ud83d?").encode(), "half a character"),
    "half a character in a key": (lambda text: text.replace("Q?", r'Q?", "\udc00": "').encode(), "half a character"),
    "half a character, raw": (lambda text: text.replace("Q?", "\ud83d").encode("utf-8", "surrogatepass"), "not UTF-8"),
    "UTF-16": (lambda text: text.encode("utf-16-le"), "UTF-16"),
    "UTF-16 with its mark": (lambda text: text.encode("utf-16"), "UTF-16"),
    "Latin-1": (lambda text: text.replace("Q?", "Qué?").encode("latin-1"), "not UTF-8"),
    "a long number": (lambda text: text.replace('"Q?"', "1" * 5000).encode(), "digits"),
    "deep nesting": (lambda text: text.replace('"Q?"', "[" * 100_000).encode(), "nested too deeply"),
    "deep objects": (lambda text: text.replace('"Q?"', '{"a":' * 100_000).encode(), "nested too deeply"),
    "a cut": (lambda text: text[: len(text) // 2].encode(), "not valid JSON"),
    "a word of JavaScript": (lambda text: text.replace('"Q?"', "undefined").encode(), "not valid JSON"),
}


@every_reader
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_json_is_one_line_with_its_place(folder: Path, read: Reader, name: str, value: object, kind: str):
    make, message = BROKEN[kind]
    path = folder / name
    path.write_bytes(make(json.dumps(value)))
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()
    if name.endswith("jsonl"):
        assert f"{path}, line 1: " in str(error.value)


@every_reader
def test_a_value_of_another_type_is_named(folder: Path, read: Reader, name: str, value: object):
    path = folder / name
    for other in ("3", "null", "true", "[]", "{}", "[[1]]"):
        path.write_text(json.dumps(value).replace('"Q?"', other))
        with pytest.raises(UserError, match=r"(question|input): ") as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("field", ["id", "question", "answers[0]", "passages[0].text", "passages[0].title"])
def test_half_a_character_is_named_by_its_field(tmp_path: Path, field: str):
    path = tmp_path / "r.jsonl"
    old = {"id": '"1"', "question": '"Q?"', "answers[0]": '"a"', "passages[0].text": '"x"', "passages[0].title": '"T"'}
    lines = json.dumps(GOOD) + "\n\n" + json.dumps(GOOD).replace(old[field], r'"\ud83d\ude00 \ude00"')
    path.write_text(lines)
    with refused(f"{path}, line 3", reason=f"{field}: holds half a character"):
        of_files(path)


def test_whole_characters_outside_of_the_first_plane_are_text():
    assert parse_json(rb'["\ud83d\ude00", "\\ud83d"]', "x") == ["😀", r"\ud83d"]


def test_only_what_the_format_needs_is_asked_of_hotpotqa_and_squad(tmp_path: Path):
    path = tmp_path / "x.json"
    for question, field in (
        ({**HOTPOT, "context": [["T"]]}, r"question 2: context\[0\]: "),
        ({**HOTPOT, "context": [["T", "x"]]}, r"question 2: context\[0\]\[1\]: "),
        ({**HOTPOT, "supporting_facts": []}, "question 2: passages: "),
        ({**HOTPOT, "supporting_facts": [["U", 0]]}, "question 2: passages: "),
        ({**HOTPOT, "answer": " "}, "question 2: answers: "),
        ([], "question 2: "),
    ):
        path.write_text(json.dumps([{**HOTPOT, "level": "hard"}, question]))
        with pytest.raises(UserError, match=field):
            of_hotpotqa(path)
    for squad, field in (
        ({}, "data: "),
        ({"data": [3]}, r"data\[0\]: "),
        ({"data": [{"title": "T", "paragraphs": [{"context": "x"}]}]}, r"data\[0\]\.paragraphs\[0\]\.qas: "),
        (
            {"data": [{"title": "T", "paragraphs": [{"context": "x", "qas": [{**QUESTION, "answers": []}]}]}]},
            "question 1",
        ),
    ):
        path.write_text(json.dumps(squad))
        with pytest.raises(UserError, match=field):
            of_squad(path)


def test_the_index_of_pandas_is_passed_over(tmp_path: Path):
    path = tmp_path / "r.parquet"
    frame = pandas.DataFrame([{**GOOD, "id": str(number)} for number in range(4)])
    frame[frame.id != "2"].to_parquet(path)
    assert "__index_level_0__" in parquet.read_schema(path).names
    assert [record.id for record in read_records(path)] == ["0", "1", "3"]
    frame.set_index("id").to_parquet(path)
    assert [record.id for record in read_records(path)] == ["0", "1", "2", "3"]


def test_a_parquet_file_that_is_damaged_in_its_middle_is_one_line(tmp_path: Path):
    path, count = tmp_path / "r.parquet", 2000
    draw = random.Random(0)
    rows = [{**GOOD, "id": str(number), "question": draw.randbytes(40).hex()} for number in range(count)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=500, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with refused(str(path), reason="damaged after row "):
        of_files(path)
    path.write_bytes(data[: len(data) // 2])
    with refused(str(path), reason="not a Parquet file"):
        of_files(path)


def test_text_in_parquet_that_is_not_utf8_is_named_by_row_and_field(tmp_path: Path):
    path = tmp_path / "r.parquet"
    questions = pyarrow.array([b"a", b"b", b"\xed\xa0\xbd"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"id": ["1", "2", "3"], "question": questions}), path)
    with refused(f"{path}, row 3", reason="'question'"):
        list(read_rows(path))


def test_a_column_that_stands_twice_is_refused(tmp_path: Path):
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 2, ["id", "id"]), path)
    with refused(str(path), reason="'id'"):
        list(read_rows(path))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path):
    for read in (lambda path: list(read_lines(path)), lambda path: read_json(path, list)):
        with refused(str(tmp_path / "x.json"), reason="cannot be read"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (QARecord("1", (Passage("T", "\udc00"),), "Q?", ("a",)), "passages[0].text"),
        (QARecord("\ud83d", (Passage("T", "x"),), "Q?", ("a",)), "id"),
        (QARecord("1", (Passage("T", "x"),), 3, ("a",)), "question"),
    ],
    ids=["text", "id", "type"],
)
def test_records_of_a_class_of_ones_own_are_looked_at_too(record: QARecord, field: str):
    class Broken(Words):
        def records(self, split: Split) -> Iterator[QARecord]:
            yield record

    with refused("Broken", reason=f"train record 1 ({field}: "):
        Broken(tokenizer=tiny_tokenizer()).prepare_data()
