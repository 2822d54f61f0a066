import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import refused
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.qa_files import QAFiles, canonical
from lrsa_lit.data.records import QARecord, read_records
from lrsa_lit.errors import UserError

SAMPLE = Path(__file__).parents[2] / "data" / "sample.jsonl"


@pytest.fixture
def hub(tmp_path: Path) -> str:
    """A local data set with SQuAD's fields."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        rows = [
            {"id": n, "context": f"Town {n} has wells.", "question": "What?", "answers": {"text": ["wells"] * 2}}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_sample_fits_a_byte_tokenizer_at_1024(tokenizer: PreTrainedTokenizerFast):
    data = QAFiles(train=str(SAMPLE), test=str(SAMPLE), tokenizer=tokenizer)
    data.prepare_data()
    data.setup()
    assert data.report["test"] == {"kept": 8}
    ids = [record.id for record in read_records(SAMPLE)]
    assert [name for batch in data.test_dataloader() for name in batch["id"]] == ids


def test_records_that_do_not_fit_are_counted(jsonl: Path, tokenizer: PreTrainedTokenizerFast):
    whole = QAFiles(test=str(jsonl), tokenizer=tokenizer)
    lengths = [len(whole.to_example(record)["input_ids"]) for record in whole.records("test")]
    data = QAFiles(test=str(jsonl), tokenizer=tokenizer, max_tokens=lengths[4])
    data.prepare_data()
    assert data.report["test"] == {"kept": 5, "too_long": 7, "shortest_too_long": lengths[5]}


def test_validation_is_optional_and_other_splits_are_missed(jsonl: Path, tokenizer: PreTrainedTokenizerFast):
    data = QAFiles(train=str(jsonl), tokenizer=tokenizer)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_dataloader()) == 12
    assert data.val_dataloader() == []
    with refused("test", reason="predict"):
        data.setup("predict")


def test_a_missing_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "none.jsonl"
    with refused("train", str(path)):
        QAFiles(train=str(path), tokenizer=tokenizer).prepare_data()


def test_what_was_prepared_does_without_its_files(jsonl: Path, tokenizer: PreTrainedTokenizerFast, caplog):
    def opened(**options: Any) -> QAFiles:
        data = QAFiles(train=str(jsonl), tokenizer=tokenizer, **options)
        data.prepare_data("fit")
        data.setup("fit")
        return data

    before = opened()
    jsonl.unlink()
    with caplog.at_level(logging.INFO):
        after = opened()
    assert f"{jsonl} is absent" in caplog.text
    assert after.fingerprint == before.fingerprint
    assert after.facts("train") == before.facts("train")
    with refused("train", str(jsonl)):
        opened(max_tokens=2000)


def test_a_file_that_comes_back_changed_is_read_anew(jsonl: Path, tokenizer: PreTrainedTokenizerFast):
    def fingerprint() -> str:
        return QAFiles(train=str(jsonl), tokenizer=tokenizer).fingerprint

    QAFiles(train=str(jsonl), tokenizer=tokenizer).prepare_data("fit")
    before, text = fingerprint(), jsonl.read_text()
    jsonl.write_text(text + "\n")
    assert fingerprint() != before
    jsonl.write_text(text)
    assert fingerprint() == before


def test_a_broken_line_leaves_no_cache(jsonl: Path, tokenizer: PreTrainedTokenizerFast, cache: Path):
    jsonl.write_text(jsonl.read_text() + "{broken\n")
    with refused(f"{jsonl}, line 13"):
        QAFiles(train=str(jsonl), tokenizer=tokenizer).prepare_data()
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({}, "hub", None),
        ({"val": "x", "hub": "y"}, "hub", None),
        ({"hub": "y", "hub_splits": {"dev": "x"}}, "hub_splits", "dev"),
        ({"hub": "y", "fields": {"context": "x"}}, "fields", "context"),
    ],
)
def test_a_bad_parameter_is_refused_at_once(parameters: dict[str, Any], field: str, value: object):
    with refused(field, value):
        QAFiles(**parameters)


def test_a_data_set_of_the_hub_is_mapped(hub: str, tokenizer: PreTrainedTokenizerFast):
    fields = {"passages": "context", "answers": "answers.text"}
    hub_splits = {"train": "train", "val": "validation"}
    data = QAFiles(hub=hub, hub_splits=hub_splits, fields=fields, tokenizer=tokenizer)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert (batch["id"], batch["answers"], len(data.train_dataloader())) == (["0"], [("wells",)], 3)
    assert "Town 0 has wells." in tokenizer.decode(batch["prompt_ids"][0])


def test_a_changed_data_set_of_the_hub_is_noticed(hub: str, tokenizer: PreTrainedTokenizerFast):
    before = QAFiles(hub=hub, tokenizer=tokenizer).fingerprint
    assert QAFiles(hub=hub, tokenizer=tokenizer).fingerprint == before
    path = Path(hub) / "train.jsonl"
    path.write_text(path.read_text().replace("Town", "City"))
    assert QAFiles(hub=hub, tokenizer=tokenizer).fingerprint != before


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"fields": {"passages": "text"}}, "train.jsonl, line 1: text: no such column"),
        (
            {"fields": {"passages": "context"}, "hub_splits": {"val": "validation"}},
            "validation.jsonl, line 1: answers: is dict",
        ),
        ({"hub_splits": {"train": "dev"}}, "cannot be loaded (Unknown split"),
        ({"hub": "/nowhere/at/all"}, "cannot be loaded ("),
    ],
    ids=["column", "type", "split", "folder"],
)
def test_a_bad_data_set_of_the_hub_is_one_line(
    hub: str, tokenizer: PreTrainedTokenizerFast, parameters: dict[str, Any], reason: str
):
    data = QAFiles(**{"hub": hub, "tokenizer": tokenizer, **parameters})
    with refused("hub", data.hub, reason=reason):
        data.prepare_data()


ROW = {"passages": "x", "question": "q?", "answers": ["a"]}


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A data set folder with one split in the format of the name."""
    folder.mkdir()
    path = folder / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return folder


def of_hub(folder: Path) -> list[QARecord]:
    return list(QAFiles(hub=str(folder), hub_splits={"train": "train"}).records("train"))


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet"])
def test_texts_of_a_folder_stay_as_they_are(tmp_path: Path, name: str):
    answers = ["2021-01-02", "2021-01-02T03:04:05Z", "17", "1e3", "null", "True"]
    records = of_hub(written(tmp_path / "set", name, [{**ROW, "answers": [text]} for text in answers]))
    assert [record.answers for record in records] == [(text,) for text in answers]
    assert [record.id for record in records] == [f"train-{number}" for number in range(6)]


def test_ids_may_be_null_or_missing_in_some_rows(tmp_path: Path):
    rows = [{**ROW, "id": None}, ROW, {**ROW, "id": 7}]
    assert [record.id for record in of_hub(written(tmp_path / "set", "train.jsonl", rows))] == [
        "train-0",
        "train-1",
        "7",
    ]


@pytest.mark.parametrize("name", [{"a": 1}, ["a"], True], ids=str)
def test_an_id_is_a_text_or_a_number(name: object):
    with refused("id"):
        canonical({**ROW, "id": name}, {}, "train-0")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_bad_row_of_a_folder_is_named_by_file_and_place(tmp_path: Path, name: str):
    folder = written(tmp_path / "set", name, [ROW, ROW])
    path = folder / name
    path.write_text(path.read_text()[::-1].replace('"question"'[::-1], '"answers"'[::-1], 1)[::-1])
    with refused("hub", reason="answers: appears twice") as caught:
        of_hub(folder)
    assert str(path) in caught.value.reason


def test_a_folder_changed_within_the_clocks_tick_is_noticed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = written(tmp_path / "set", "train.jsonl", [ROW])
    path, parameters = folder / "train.jsonl", {"hub_splits": {"train": "train"}, "tokenizer": tokenizer}
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    before = QAFiles(hub=str(folder), **parameters).fingerprint
    path.write_text(path.read_text().replace("q?", "r?"))
    os.utime(path, ns=times)
    assert QAFiles(hub=str(folder), **parameters).fingerprint != before


@pytest.mark.parametrize(
    "passages",
    [{"title": ["A"], "text": []}, {"title": "A", "text": "x"}, {"title": None}, [{"title": "A", "text": ["x", 3]}], 3],
    ids=str,
)
def test_passages_of_no_known_shape_are_refused(passages: object):
    with pytest.raises(UserError, match=r"^passages"):
        QARecord.from_dict(canonical({**ROW, "passages": passages}, {}, "train-0"))


def test_shapes_that_other_data_sets_have():
    row = {
        "question": "Q?",
        "answer": "yes",
        "context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]},
        "supporting_facts": {"title": ["B", "B"], "sent_id": [0, 1]},
        "level": "hard",
    }
    fields = {"passages": "context", "answers": "answer", "supporting_titles": "supporting_facts.title"}
    record = QARecord.from_dict(canonical(row, fields, "train-0"))
    assert [(passage.title, passage.text) for passage in record.passages] == [("A", "One. Two."), ("B", "Three.")]
    assert (record.id, record.answers, record.supporting_titles) == ("train-0", ("yes",), ("B",))


def test_canonical_rows_need_no_mapping():
    for record in read_records(SAMPLE):
        assert QARecord.from_dict(canonical(asdict(record), {}, "unused")) == record
