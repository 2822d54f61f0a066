"""Where answers stand, and what is made of them there."""

import json

import numpy as np
import pytest
import torch
from experiments.report.lines import evaluation, study_of
from experiments.tiny_study import STUDY
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from visible import visible_keys

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.main import main
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.report import places
from lrsa_lit.experiments.report.cells import Cells, Table
from lrsa_lit.experiments.report.places import ALWAYS, ELSEWHERE, LAST, NOWHERE, PLACES, place_of
from lrsa_lit.ops.sparse_attention import Recency
from lrsa_lit.systems import KeyNorm

RULE = {"lag_size": 4, "top_k": 1}
SPANS = st.lists(st.tuples(st.integers(0, 59), st.integers(1, 8)), max_size=3)


@given(SPANS, st.integers(1, 60), st.integers(0, 5), st.integers(2, 12), st.integers(1, 3), st.data())
def test_places_are_what_the_operator_lets_the_last_token_see(spans, length, sinks, lag, chunks, data):
    kept = data.draw(st.integers(0, lag))
    rule = LRSAConfig(sink_size=sinks, lag_size=lag, top_k=kept, chunk_size=chunks * lag)
    spans = [(start, start + count) for start, count in spans if start + count <= length]
    found = place_of({"prompt_length": length, "answer_spans": spans}, rule)
    pairs = torch.zeros(1, 1, length, 2)
    seen = {
        name: visible_keys(pairs, pairs, rule.replace(top_k=count, compressor=Recency()))[0, 0, -1]
        for name, count in ((ALWAYS, 0), (LAST, kept))
    }
    whole = {name: any(mask[start:stop].all() for start, stop in spans) for name, mask in seen.items()}
    assert found == (ALWAYS if whole[ALWAYS] else LAST if whole[LAST] else ELSEWHERE if spans else NOWHERE)


@pytest.fixture
def against(study_file):
    """The study with a rule that compresses its short questions, and its part that names a rule."""
    parts = {"places": {"rows": ["dense"], "seeds": [0], "inference": ["short", "dense"], "sets": ["plain"],
                        "against": {"row": "dense", "inference": "short"}}}  # fmt: skip
    return study_of(study_file.parent, inference=STUDY["inference"] | {"short": RULE}, parts=STUDY["parts"] | parts)


def lines_of(study, data):
    digest = Questions(study, data).facts("plain", "test").digest
    return [
        evaluation(study, "dense", "short", [1.0, 0.5, 0.0], set_digest=digest),
        evaluation(study, "dense", "dense", [0.0, 0.0, 1.0], set_digest=digest),
    ]


def test_scores_are_of_the_questions_of_each_place(against, data, monkeypatch):
    monkeypatch.setattr(places, "place_of", lambda example, rule: LAST if example["id"] == "test-1" else NOWHERE)
    table = Table(Cells(against, lines_of(against, data)), "places", "plain")
    found = places.by_place(table, data).frame(intervals=False).set_index("inference")
    names = [f"{name} ({count})" for name, count in zip(PLACES, [0, 1, 0, 2], strict=True)]
    assert list(found.columns) == ["trained", "seeds", *names]
    assert found.loc["short", names].astype(float).tolist() == pytest.approx([np.nan, 0.5, np.nan, 0.5], nan_ok=True)
    assert found.loc["dense", names].astype(float).tolist() == pytest.approx([np.nan, 0.0, np.nan, 0.5], nan_ok=True)


def test_a_document_has_them_as_a_block_and_says_what_it_needs(
    against, study_file, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "r.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines_of(against, data)))
    document = tmp_path / "R.md"
    document.write_text("<!-- study:places/plain/places -->\n<!-- /study -->\n")
    command = ["study", "report", str(results), "--study", str(study_file), "--into", "R.md"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    said = capsys.readouterr().err
    assert "--data" in said
    assert said.count("\n") == 1
    assert document.read_text() == "<!-- study:places/plain/places -->\n<!-- /study -->\n"
    main([*command, "--data", str(data)])
    text = document.read_text()
    assert "| trained | inference | seeds | visible to all heads (" in text
    assert "| dense | short | 1 |" in text


def test_rules_of_other_partitions_have_no_places_in_common(against, data):
    lines = lines_of(against, data)
    lines[1] |= {"rule": against.inference["4x"].to_dict()}
    table = Table(Cells(against, lines), "places", "plain")
    with refused("parts.places", reason="lag_size 32"):
        places.by_place(table, data)


def test_places_are_those_of_one_k_and_of_no_system(against, data, monkeypatch):
    lines, rule = lines_of(against, data), against.inference["short"]
    table = Table(Cells(against, lines), "places", "plain")
    lines[1] |= {"rule": rule.replace(system=KeyNorm()).to_dict()}
    with refused("parts.places", reason="dense under dense has a system, KeyNorm"):
        places.by_place(table, data)
    # Heads of other K see the same sinks and window.
    lines[1] |= {"rule": rule.replace(head_top_k=[0, [4, 1]]).to_dict()}
    assert places.by_place(table, data).frame(intervals=False)["inference"].tolist() == ["short", "dense"]
    for other, reason in (
        (rule.replace(system=KeyNorm()), "no partitions"),
        (rule.replace(head_top_k=[0, 1]), "a K for each head"),
    ):
        monkeypatch.setitem(against.inference, "short", other)
        with refused("parts.places.against", reason=reason):
            places.by_place(table, data)


@pytest.mark.parametrize("case", ["no-rule", "other-questions"])
def test_what_has_no_places_is_refused(case, against, study_file, data, results, capsys, tmp_path):
    part = "main" if case == "no-rule" else "all"
    document = tmp_path / "R.md"
    document.write_text(f"<!-- study:{part}/plain/places -->\n<!-- /study -->\n")
    if case == "other-questions":
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        changed = [line | {"set_digest": "0" * 12} if "set_digest" in line else line for line in lines]
        results.write_text("".join(json.dumps(line) + "\n" for line in changed))
    with pytest.raises(SystemExit, match="2"):
        main(["study", "report", str(results), "--study", str(study_file), "--into", str(document),
              "--data", str(data)])  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("parts.main.against" if case == "no-rule" else "its questions are not those") in said
