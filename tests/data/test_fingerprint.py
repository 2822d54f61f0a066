"""What names the examples of a data set changes with all that decides them, and with nothing else."""

import importlib
import sys
from pathlib import Path

import pytest

from lrsa_lit.data import fingerprint
from lrsa_lit.models.tiny import tiny_tokenizer


def test_the_digest_depends_on_every_part_but_not_on_order(monkeypatch):
    first = fingerprint.digest({"a": 1, "b": [2]})
    assert first == fingerprint.digest({"b": [2], "a": 1})
    assert first != fingerprint.digest({"a": 1, "b": [3]})
    monkeypatch.setattr(fingerprint, "PROJECT", "changed")
    assert first != fingerprint.digest({"a": 1, "b": [2]})


def test_a_tokenizer_is_known_by_what_decides_its_tokens():
    first, second = tiny_tokenizer(), tiny_tokenizer()
    second(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert fingerprint.of_tokenizer(first) == fingerprint.of_tokenizer(second)
    second.chat_template += " "
    assert fingerprint.of_tokenizer(first) != fingerprint.of_tokenizer(second)
    third = tiny_tokenizer()
    third.add_tokens(["token"])
    assert fingerprint.of_tokenizer(first) != fingerprint.of_tokenizer(third)


def test_the_project_is_known_by_all_code_that_shapes_an_example():
    names = {"/".join(path.parts[-2:]) for path in fingerprint.source_files("lrsa_lit.data.squad")}
    assert {"data/squad.py", "data/prompts.py", "lrsa_lit/chat_template.py", "evaluation/answer_scores.py"} <= names
    assert len(names) == len({*Path(fingerprint.__file__).parent.rglob("*.py")}) + 2


PACKAGES = {"module": ["own_sets.py"],
            "package": ["own_sets/__init__.py", "own_sets/deep/words.py", "own_sets/sets.py"],
            "no __init__.py": ["own_sets/sets.py", "own_sets/words.py"]}  # fmt: skip


@pytest.mark.parametrize("files", PACKAGES.values(), ids=PACKAGES)
def test_a_class_of_ones_own_is_known_by_the_source_of_its_package(tmp_path, monkeypatch, files):
    monkeypatch.syspath_prepend(tmp_path)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("class Own: ...\n")
    (tmp_path / "elsewhere.py").touch()
    module = "own_sets" if len(files) == 1 else "own_sets.sets"

    def code():
        for name in [name for name in sys.modules if name.partition(".")[0] == "own_sets"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return fingerprint.of_code(importlib.import_module(module).Own)

    found = [code()]
    assert not found[0].startswith("no file")
    (tmp_path / "elsewhere.py").write_text("x = 1\n")
    assert code() == found[0]
    for file in files:
        (tmp_path / file).write_text("class Own: ...\nx = 1\n")
        found.append(code())
    assert len(set(found)) == len(files) + 1


def test_files_that_parameters_name_are_known_by_size_and_content(tmp_path):
    (tmp_path / "a.csv").write_text("one")
    values = {"table": str(tmp_path / "a.csv"), "more": [{"x": "data/sample.jsonl"}], "text": "no file", "size": 3}
    values |= {"long": "x" * 100_000, "folder": str(tmp_path), "odd": "a\0b", "missing": "package://none-such/x"}
    found = fingerprint.of_files(values)
    assert list(found) == [values["table"], "data/sample.jsonl"]
    assert found[values["table"]].startswith("3 ")
    (tmp_path / "a.csv").write_text("two")
    assert fingerprint.of_files(values) != found
