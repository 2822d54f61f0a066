"""Token files and results on the disk."""

import numpy as np
import pytest
from experiments.report.lines import training
from helpers import one_line
from study.conftest import examples

from lrsa_lit.errors import UserError
from lrsa_lit.study import tokens
from lrsa_lit.study.results import Results, current, read_lines


def test_examples_survive_a_file(tmp_path):
    given = examples("test", 4)
    written = tokens.write(tmp_path / "new" / "a.npz", given)
    assert written == tokens.read(tmp_path / "new" / "a.npz")
    for one, other in zip(given, written.examples, strict=True):
        spans = {name: [list(span) for span in one[name]] for name in ("gold_spans", "answer_spans")}
        assert {**one, **spans} == other
    assert written.lengths == [len(example["input_ids"]) for example in given]
    assert not list((tmp_path / "new").glob(".*"))


def test_a_digest_is_of_the_examples_and_not_of_the_file(tmp_path):
    given = examples("test", 3)
    one = tokens.write(tmp_path / "a.npz", given)
    assert tokens.write(tmp_path / "b.npz", given).digest == one.digest
    changed = [{**given[0], "answers": ["other"]}, *given[1:]]
    assert tokens.write(tmp_path / "c.npz", changed).digest != one.digest
    assert tokens.write(tmp_path / "d.npz", given[::-1]).digest != one.digest


def test_questions_of_one_subject_are_of_one_context(tmp_path):
    given = examples("test", 4)
    assert tokens.write(tmp_path / "a.npz", given).contexts == [0, 1, 2, 3]
    subjects = ["Rhine", "Oxygen", "Rhine", ""]
    named = [{**example, "subject": subject} for example, subject in zip(given, subjects, strict=True)]
    assert tokens.write(tmp_path / "b.npz", named).contexts == [0, 1, 0, 2]
    # As they come from the cache.
    without = [{**example, "subject": ""} for example in given]
    assert tokens.write(tmp_path / "c.npz", without) == tokens.read(tmp_path / "a.npz")


def test_tokens_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    given = {**examples("test", 1)[0], "input_ids": [1, 65_536]}
    with pytest.raises(UserError, match="65536"):
        tokens.write(tmp_path / "a.npz", [given])
    with pytest.raises(UserError, match="no examples"):
        tokens.write(tmp_path / "a.npz", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04broken"])
def test_broken_files_are_named(content, tmp_path):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError) as error:
        tokens.read(tmp_path / "a.npz")
    assert "a.npz" in one_line(error.value)
    np.savez_compressed(tmp_path / "b.npz", tokens=np.zeros(3, dtype=np.uint16))
    with pytest.raises(UserError, match=r"b\.npz"):
        tokens.read(tmp_path / "b.npz")


def test_a_damaged_file_is_named(tmp_path):
    tokens.write(tmp_path / "a.npz", examples("test", 4))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    # Within the first of the compressed arrays.
    content[100:140] = b"\xff" * 40
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: it is no file of"):
        tokens.read(tmp_path / "a.npz")


def test_what_a_killed_process_has_left_of_a_line_gives_way(tmp_path):
    path = tmp_path / "r.jsonl"
    first = training()
    Results(path).append(first)
    with path.open("a") as file:
        file.write('{"kind": "train')
    results = Results(path)
    assert results.lines == [first]
    assert results.weights_of(config="a", seed=0, train_digest="d") == "w"
    assert results.weights_of(config="a", seed=1, train_digest="d") is None
    results.append({**first, "seed": 1})
    results.append({**first, "steps": 4})
    assert [line["steps"] for line in read_lines(path)] == [4, 3]
    assert len(path.read_text().splitlines()) == 3


def test_results_of_weights_that_were_trained_anew_are_past():
    def line(kind, weights, seed=0):
        return {"kind": kind, "config": "a", "seed": seed, "train_digest": "d", "weights": weights}

    first = [line("training", "w"), line("evaluation", "w"), line("evaluation", "x", seed=1)]
    assert current(first) == first
    again = [line("training", "v"), line("evaluation", "v")]
    assert current([*first, *again]) == [first[2], *again]


def test_examples_of_one_text_share_a_context(tmp_path):
    text, other = list(range(10, 410)), list(range(500, 900))
    prompts = [[*text, 1, 2], [*other, 1, 2], [*text, 3, 4, 5, 6], [*text[:399], 3]]
    given = [{**examples("test", 1)[0], "input_ids": ids, "prompt_length": len(ids)} for ids in prompts]
    assert tokens.write(tmp_path / "a.npz", given).contexts == [0, 1, 0, 0]
    short = [{**given[0], "input_ids": [1, 2, 3], "prompt_length": 3}] * 2
    assert tokens.write(tmp_path / "b.npz", short).contexts == [0, 1]
