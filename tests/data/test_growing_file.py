"""A file that grows line by line: what a kill leaves, who may write it, and what is in the way."""

import json

import pytest
from helpers import refused

from lrsa_lit.data.growing_file import growing_file


def write(path, lines):
    with growing_file("--to", path) as file:
        for line in lines:
            file.add(line)
        return [row for _, row in file.rows]


def test_lines_are_there_when_the_file_is_opened_again(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert write(path, [{"a": "é"}, {"a": 2}]) == []
    assert write(path, [{"a": 3}]) == [{"a": "é"}, {"a": 2}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": "é"}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("left", ['{"a": 2', '{"a": 2}', "\xe9"])
def test_a_line_that_was_not_finished_is_taken_out(tmp_path, left):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + left.encode("latin-1"))
    assert write(path, [{"a": 3}]) == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "lines.jsonl"
    with growing_file("--to", path) as file:
        file.add({"a": 1})
        with refused("--to", path, reason="is being written by another process"), growing_file("--to", path):
            pass
    assert write(path, []) == [{"a": 1}]


def test_what_cannot_be_a_file_is_refused(tmp_path):
    with refused("--to", tmp_path, reason="cannot be written"), growing_file("--to", tmp_path):
        pass
    (tmp_path / "lines.jsonl").write_text("{\n")
    with refused(f"{tmp_path}/lines.jsonl, line 1"), growing_file("--to", tmp_path / "lines.jsonl"):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    with refused("--to", path, reason="cannot be written"), growing_file("--to", path) as file:
        file.add({"a": 1})
        monkeypatch.setattr("os.fsync", fail)
        file.add({"a": 2})
    monkeypatch.undo()
    assert write(path, []) == [{"a": 1}]


def fail(number):
    raise OSError(28, "No space left on device")
