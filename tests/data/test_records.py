import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lrsa_lit.data.reading import read_json
from lrsa_lit.data.records import QARecord, read_records
from lrsa_lit.errors import UserError

SAMPLE = Path(__file__).parents[2] / "data" / "sample.jsonl"
GOOD = {"id": "1", "passages": [{"title": "T", "text": "x"}], "question": "Q?", "answers": ["a", "b"]}


def test_target_is_the_first_alternative_or_all_required_answers(record: QARecord):
    assert record.target == "Tesmar"
    assert replace(record, match="all").target == "Tesmar, in Tesmar"


def test_a_record_survives_json(record: QARecord):
    assert QARecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_optional_fields_may_be_absent_or_null():
    assert QARecord.from_dict(GOOD) == QARecord.from_dict(
        {**GOOD, "supporting_titles": None, "match": None, "task": None}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "field 'id' must be a string, got int"),
        ({"question": None}, "field 'question' must be a string, got null"),
        ({"question": ""}, "field 'question' is empty, at least one is needed"),
        ({"answers": "a"}, "field 'answers' must be a list, got str"),
        ({"answers": ["a", 3]}, "field 'answers' must be a list of strings, got one of int"),
        ({"answers": []}, "field 'answers' is empty, at least one is needed"),
        ({"answers": [" "]}, "field 'answers' holds an empty string: [' ']"),
        ({"passages": ["x"]}, "field 'passages[0]' must be an object with title and text, got str"),
        ({"passages": [{"title": "T"}]}, "field 'passages[0].text' is missing"),
        ({"match": "some"}, "field 'match' is 'some', allowed are any, all"),
        ({"task": "a/b"}, "field 'task' is 'a/b', allowed are letters, digits, dot, - and _"),
        ({"supporting_titles": ["U"]}, "field 'supporting_titles' names 'U', which is the title of no passage"),
        (
            {"answer": "a"},
            "unknown field 'answer', allowed are id, passages, question, answers, supporting_titles, match, task",
        ),
    ],
    ids=str,
)
def test_a_bad_field_is_named(change: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        QARecord.from_dict({**GOOD, **change})
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["id", "passages", "question", "answers"])
def test_a_missing_field_is_named(name: str):
    with pytest.raises(UserError, match=f"^field '{name}' is missing$"):
        QARecord.from_dict({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{nonsense", "line 4: not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
        ('{"id": "\ud800"}'.encode("utf-8", "surrogatepass"), "line 4: not valid JSON"),
        ("[1]", "line 4: a record must be an object, got list"),
        ("{}", "line 4: field 'id' is missing"),
    ],
)
def test_a_broken_line_is_found(tmp_path: Path, broken: str | bytes, message: str):
    path = tmp_path / "r.jsonl"
    start = (json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n").encode()
    path.write_bytes(start + (broken.encode() if isinstance(broken, str) else broken) + b"\n")
    with pytest.raises(UserError) as error:
        list(read_records(path))
    assert str(error.value).startswith(f"{path}, {message}")
    assert "\n" not in str(error.value)


def test_parquet_reads_as_jsonl_does(tmp_path: Path):
    records = list(read_records(SAMPLE))
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([record.to_dict() for record in records]), path)
    assert list(read_records(path)) == records


def test_a_broken_parquet_row_is_found(tmp_path: Path):
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, {**GOOD, "question": None}]), path)
    with pytest.raises(UserError, match=r"r\.parquet, row 2: field 'question' must be a string, got null$"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", "", "the suffix is '.csv', allowed are .jsonl, .parquet"),
        ("r.jsonl", None, "no such file"),
        ("r.parquet", "text", "not a Parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str | None, message: str):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        list(read_records(path))
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [("[", "not valid JSON"), ("{}", "holds a dict, allowed is a list")])
def test_json_of_another_kind_is_refused(tmp_path: Path, content: str, message: str):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_json(path, list)


def test_the_sample_is_small_and_varied():
    records = list(read_records(SAMPLE))
    assert 6 <= len(records) <= 10
    assert {record.match for record in records} == {"any", "all"}
    assert len({record.id for record in records}) == len(records)
