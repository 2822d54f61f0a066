"""Results as tables of pandas."""

import math

import pandas as pd
import pytest
from experiments.report.lines import evaluation, evaluations, scores, study_of
from helpers import refused

from lrsa_lit.cli.study import open_study
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import places
from lrsa_lit.experiments.report.cells import Cells, Table
from lrsa_lit.experiments.report.document import results_of
from lrsa_lit.experiments.report.evidence import perplexity
from lrsa_lit.experiments.report.tables import full, matrix
from lrsa_lit.paths import nearest


@pytest.fixture
def cells(study_file):
    study = open_study(str(study_file))
    named = evaluation(study, "lrsa", "4x", scores(0.6), text=[f"answer {n}" for n in range(200)])
    others = evaluations(study, ("dense", "dense", 0.8), ("dense", "4x", 0.4), ("lrsa", "4x", 0.7, 1))
    return Cells(study, [*others, named])


def test_a_matrix_has_a_place_for_what_is_not_measured(cells):
    found = matrix(Table(cells, "main", "plain")).frame(intervals=False)
    wanted = pd.DataFrame({"trained": ["dense", "lrsa"], "seeds": 1, "dense": [0.8, math.nan], "4x": [0.4, 0.6]})
    pd.testing.assert_frame_equal(found, wanted)


def test_perplexities_of_frames_are_no_losses(tmp_path):
    study = study_of(tmp_path)
    line = evaluation(study, "dense", "4x", [0.0, 0.0], data_set="text")
    line |= {"f1": [], "em": [], "recall": [], "loss": [1.0, 5.0], "tokens": [1, 2]}
    cells = Cells(study, [line])
    table = Table(cells, "main", "text")
    for grid, column in ((perplexity(cells), "perplexity"), (full(table), "perplexity"), (matrix(table), "4x")):
        assert grid.frame(intervals=False)[column].dropna().tolist() == pytest.approx([math.exp(2.0)])
    assert full(table).frame()["loss"].tolist() == [2.0]


def test_a_row_own_attention_is_a_column_if_it_is_another(cells):
    assert Table(cells, "all", "plain").attentions == ["own", "random-4x"]


def test_entries_hold_what_is_compared(cells):
    found = full(Table(cells, "main", "plain")).frame().set_index(["trained", "inference"])
    assert list(found.index) == [("dense", "dense"), ("dense", "4x"), ("lrsa", "4x")]
    assert found.loc[("lrsa", "4x"), ["seeds", "kept", "of dense", "minus dense-trained"]].tolist() == pytest.approx(
        [1, 0.25, 0.6 / 0.8, 0.2]
    )
    assert found.loc[("lrsa", "4x"), "F1 low"] < 0.6 < found.loc[("lrsa", "4x"), "F1 high"]
    assert found["p"].isna().tolist() == [True, True, False]


def test_answers_stand_side_by_side(cells):
    found = places.answers(Table(cells, "main", "plain"), 150)
    assert found["answer"].tolist() == ["answer", "answer", "answer 150"]
    assert found["score"].tolist() == [1.0, 0.0, 0.0]
    with refused("number", 200, "0 to 199"):
        places.answers(Table(cells, "main", "plain"), 200)


def test_questions_must_be_those_of_the_results(study_file, data, results):
    study = open_study(str(study_file))
    table = Table(Cells(study, results_of(study, results)), "main", "plain")
    assert places.question(table, 2, str(data)) == {"question": "Which?", "answers": ["a2", "b"]}
    table.cells[0].line["set_digest"] = "other"
    with pytest.raises(UserError) as caught:
        places.question(table, 2, str(data))
    assert caught.value.field.startswith(str(data))


def test_files_are_found_above(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert nearest("study") == tmp_path / "study"
    assert str(nearest("none.jsonl")) == "none.jsonl"
