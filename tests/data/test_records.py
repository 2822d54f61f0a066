import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import refused
from pyarrow import parquet

from lrsa_lit.data.reading import read_json
from lrsa_lit.data.records import QARecord, read_records

SAMPLE = Path(__file__).parents[2] / "data" / "sample.jsonl"
GOOD = {"id": "1", "passages": [{"title": "T", "text": "x"}], "question": "Q?", "answers": ["a", "b"]}


def test_target_is_the_first_alternative_or_all_required_answers(record: QARecord):
    assert record.target == "Tesmar"
    assert replace(record, match="all").target == "Tesmar, in Tesmar"


def test_a_record_survives_json(record: QARecord):
    assert QARecord.from_dict(json.loads(json.dumps(asdict(record)))) == record


def test_optional_fields_may_be_absent_or_null():
    assert QARecord.from_dict(GOOD) == QARecord.from_dict(
        {**GOOD, "supporting_titles": None, "match": None, "task": None}
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": 3}, "id"),
        ({"question": None}, "question"),
        ({"question": ""}, "question"),
        ({"answers": "a"}, "answers"),
        ({"answers": ["a", 3]}, "answers[1]"),
        ({"answers": []}, "answers"),
        ({"answers": [" "]}, "answers"),
        ({"passages": ["x"]}, "passages[0]"),
        ({"passages": [{"title": "T"}]}, "passages[0].text"),
        ({"match": "some"}, "match"),
        ({"match": "verbatim"}, "answers"),
        ({"match": "verbatim", "answers": ["word"]}, "answers"),
        ({"task": "a/b"}, "task"),
        ({"supporting_titles": ["U"]}, "supporting_titles"),
        ({"answer": "a"}, "answer"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(change: dict[str, Any], field: str):
    with refused(field):
        QARecord.from_dict({**GOOD, **change})


@pytest.mark.parametrize("name", ["id", "passages", "question", "answers"])
def test_a_missing_field_is_named(name: str):
    with refused(name, reason="missing"):
        QARecord.from_dict({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{nonsense", "column 2"),
        ('{"id": "\ud800"}'.encode("utf-8", "surrogatepass"), "JSON"),
        ("[1]", "object"),
        ("{}", "id: is missing"),
    ],
)
def test_a_broken_line_is_found(tmp_path: Path, broken: str | bytes, reason: str):
    path = tmp_path / "r.jsonl"
    start = (json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n").encode()
    path.write_bytes(start + (broken.encode() if isinstance(broken, str) else broken) + b"\n")
    with refused(f"{path}, line 4", reason=reason):
        list(read_records(path))


def test_parquet_reads_as_jsonl_does(tmp_path: Path):
    records = list(read_records(SAMPLE))
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([asdict(record) for record in records]), path)
    assert list(read_records(path)) == records


def test_a_broken_parquet_row_is_found(tmp_path: Path):
    path = tmp_path / "r.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, {**GOOD, "question": None}]), path)
    with refused(f"{path}, row 2", reason="question: is null"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("r.csv", "", "'.csv'"),
        ("r.jsonl", None, "no such file"),
        ("r.parquet", "text", "not a Parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str | None, reason: str):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with refused(str(path), reason=reason):
        list(read_records(path))


@pytest.mark.parametrize(("content", "reason"), [("[", "JSON"), ("{}", "dict")])
def test_json_of_another_kind_is_refused(tmp_path: Path, content: str, reason: str):
    path = tmp_path / "x.json"
    path.write_text(content)
    with refused(str(path), reason=reason):
        read_json(path, list)


def test_the_sample_is_small_and_varied():
    records = list(read_records(SAMPLE))
    assert 6 <= len(records) <= 10
    assert {record.match for record in records} == {"any", "all"}
    assert len({record.id for record in records}) == len(records)
