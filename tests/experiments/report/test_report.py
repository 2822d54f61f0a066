"""Tables, plots and the store, from results that a tiny study has written."""

import json
import math

import numpy as np
import pytest
from cli_helpers import refusal
from experiments.report.lines import evaluation, evaluations, scores, study_of
from experiments.tiny_study import STUDY
from helpers import one_line
from mlflow.tracking import MlflowClient

from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import open_study
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report.cells import Cells, Table, reference_of
from lrsa_lit.experiments.report.document import results_of
from lrsa_lit.experiments.results import read_lines


def test_a_report_has_a_table_for_each_part_and_data_set(study_file, results, tmp_path, capsys):
    main(["study", "report", str(results), "--study", str(study_file), "--to", str(tmp_path / "report")])
    text = (tmp_path / "report" / "report.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Targets", "## main: plain (test)", "## main: text (test)", "## all: plain (test)",
        "## Perplexity", "## Supporting tokens kept", "## Training", "## Machines"]  # fmt: skip
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {
        "main-plain.png", "all-plain.png", "perplexity.png", "survival.png"}  # fmt: skip
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| dense | 4x | 1 | 25%")]
    own = [line for line in read_lines(results) if (line["row"], line.get("attention")) == ("dense", "4x")]
    assert rows[0][5].startswith(f"{np.mean(own[0]['f1']):.3f} [")
    perplexity = math.exp(sum(own[1]["loss"]) / sum(own[1]["tokens"]))
    assert rows[1][5].startswith(f"{math.log(perplexity):.3f} [")
    assert rows[1][6].startswith(f"{perplexity:.2f} [")


def test_cells_gather_the_seeds_of_their_part_and_are_held_against_dense_training(study_file, results):
    cells = Cells(open_study(str(study_file)), read_lines(results))

    def entries(part):
        return {(entry.cell.row, entry.cell.attention): entry for entry in Table(cells, part, "plain").entries}

    own = entries("main")["lrsa", "4x"]
    dense = entries("main")["dense", "dense"].cell
    # Another part has run a second seed.
    assert own.cell.scores("f1").shape == (1, 3)
    assert own.of_dense.difference.value == pytest.approx(own.cell.mean("f1") - dense.mean("f1"))
    assert own.of_same is not None
    assert entries("main")["dense", "dense"].of_same is None
    assert own.cell.kept == 0.25
    assert own.of_named is None
    both = entries("all")["lrsa", "own"]
    assert both.cell.scores("f1").shape == (2, 3)
    assert both.of_named is None
    # Of dense training there is one seed.
    assert both.of_dense.difference == own.of_dense.difference
    random = entries("all")["lrsa", "random-4x"]
    assert random.of_named.difference.value == pytest.approx(random.cell.mean("f1") - both.cell.mean("f1"))


def test_the_base_model_stands_beside_seeds_that_it_does_not_have(tmp_path):
    parts = {"late": {"rows": ["base", "dense", "lrsa"], "seeds": [1], "inference": ["4x"], "sets": ["plain"]}}
    study = study_of(tmp_path, parts=parts)
    trained = ("dense", "4x", 0.9), ("dense", "4x", 0.4, 1), ("lrsa", "4x", 0.9)
    lines = evaluations(study, ("base", "4x", 0.2), *trained)
    table = Table(Cells(study, lines), "late", "plain")
    assert [(entry.cell.row, entry.score.value) for entry in table.entries] == [("base", 0.2), ("dense", 0.4)]
    assert (table.done, table.asked) == (2, 3)
    assert table.entries[0].of_same.difference.value == pytest.approx(-0.2)


def test_rows_are_held_against_dense_training_at_its_own_rate(tmp_path):
    fast = {"optimizer": {"init_args": {"lr": 0.1}}}
    long = {"trainer": {"max_steps": 9}}
    more = {"dense-fast": {"model": {"train_attention": None, **fast}}, "lrsa-fast": {"model": fast},
            "lrsa-long": long, "dense-long": {**long, "model": {"train_attention": None, **fast}}}  # fmt: skip
    study = study_of(tmp_path, rows=STUDY["rows"] | more)
    found = {row.name: reference_of(study, row).name for row in study.rows.values()}
    long = {"lrsa-long": "dense-long", "dense-long": "dense-long"}
    assert found == dict.fromkeys(study.rows, "dense") | long


def test_a_part_of_losses_has_tables_of_losses_and_no_losses_count_twice(tmp_path):
    parts = {"quick": {"rows": ["base"], "inference": ["dense"], "sets": ["plain"], "generate": False}}
    parts["full"] = {**parts["quick"], "generate": True}
    study = study_of(tmp_path, parts=parts)
    answers = evaluation(study, "base", "dense", [0.0, 1.0], generated=True, loss=[2.0, 3.0])
    losses = answers | {"generated": False, "f1": [], "em": [], "recall": [], "text": []}
    lines = [losses, answers]
    tables = [Table(Cells(study, lines), part, "plain") for part in ("quick", "full")]
    assert [table.measure for table in tables] == ["loss", "f1"]
    assert [table.cells[0].lines for table in tables] == [(answers,), (answers,)]
    assert Table(Cells(study, [losses]), "full", "plain").cells == []
    (entry,) = Table(Cells(study, [losses]), "quick", "plain").entries
    assert entry.score.low < entry.score.value == sum(losses["loss"]) / sum(losses["tokens"]) < entry.score.high


def test_a_store_without_results_of_the_study_is_refused(study_file, tmp_path, capsys):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    MlflowClient(uri).create_experiment("any")
    error = refusal(capsys, "study", "report", uri, "--study", str(study_file), "--to", str(tmp_path / "report"))
    assert "has no results of the study tiny-study" in error
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(("name", "said"), [("none.jsonl", "no such file"), ("empty.jsonl", "it holds no results")])
def test_no_results_no_report(name, said, study_file, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    assert f"{name}: {said}" in refusal(capsys, "study", "report", str(tmp_path / name), "--study", str(study_file))


def test_results_have_the_names_of_today(study_file, results, tmp_path):
    study = open_study(str(study_file))
    renamed = [{**line, "row": f"once-{line['row']}"} for line in read_lines(results)]
    gone = {**renamed[0], "config": "0" * 12}
    path = tmp_path / "renamed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*renamed, gone]))
    assert results_of(study, path) == results_of(study, results)
    path.write_text(json.dumps(gone) + "\n")
    with pytest.raises(UserError) as error:
        results_of(study, path)
    assert "no results" in one_line(error.value)


def test_an_attention_that_is_no_more_is_not_taken_for_the_rows_own(study_file):
    study = open_study(str(study_file))
    gone = {"rule_digest": "0" * 12, "rule": {**study.row("lrsa").rule.to_dict(), "top_k": 1}}
    lines = [evaluation(study, "lrsa", "own", scores(0.5)), evaluation(study, "lrsa", "4x", scores(0.9), **gone)]
    (cell,) = Cells(study, lines).on("plain").cells()
    assert cell.line["f1"] == scores(0.5)


@pytest.mark.parametrize("line", [b'{"kind": "other"}', b'{"row": "base"}', b"[]", b"\xff"])
def test_a_line_that_is_no_result_is_named(line, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError) as error:
        read_lines(tmp_path / "r.jsonl")
    assert "line 1" in one_line(error.value)


@pytest.mark.parametrize("field", ["row", "f1", "seed", "machine"])
def test_a_result_that_lacks_a_field_is_named(field, study_file, tmp_path, capfd):
    study = open_study(str(study_file))
    whole = evaluation(study, "base", "dense", scores(0.5))
    part = {name: value for name, value in evaluation(study, "lrsa", "4x", scores(0.5)).items() if name != field}
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (whole, part)))
    with pytest.raises(SystemExit, match="2"):
        main(["study", "report", str(path), "--study", str(study_file), "--to", str(tmp_path / "report")])
    assert capfd.readouterr().err == f"lrsa: error: {path}, line 2: it lacks {field!r}, which each evaluation has\n"
    assert not (tmp_path / "report").exists()


def test_results_from_before_weights_had_a_digest(study_file, tmp_path):
    old = evaluation(open_study(str(study_file)), "lrsa", "4x", scores(0.5))
    del old["weights"]
    (tmp_path / "r.jsonl").write_text(json.dumps(old) + "\n")
    assert read_lines(tmp_path / "r.jsonl") == [{**old, "weights": "", "generated": True}]


def test_names_in_results_are_text_within_their_cells(study_file, results, tmp_path):
    evil = "a|b\n<!-- /study -->\n<script>x</script>\x1b[2J"
    lines = read_lines(results)
    for line in lines:
        line["machine"] = {**line["machine"], "device": evil, "commit": evil}
    path = tmp_path / "evil.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = tmp_path / "doc.md"
    document.write_text("<!-- study:machines -->\n<!-- /study -->\nthe end\n")
    to = ["--to", str(tmp_path / "report"), "--into", str(document)]
    for _ in range(2):
        main(["study", "report", str(path), "--study", str(study_file), *to])
        text = document.read_text()
        assert text.count("<!-- /study -->") == 1
        assert text.endswith("<!-- /study -->\nthe end\n")
        assert r"a\|b<br>&lt;!-- /study --&gt;<br>&lt;script&gt;" in text
        assert "\x1b" not in text
        assert "<script>" not in text


def test_a_report_needs_no_field_that_results_may_lack(study_file, results, tmp_path):
    optional = {"contexts", "dtype", "generated", "length", "losses", "seconds", "survival", "weights"}
    lines = [{name: line[name] for name in line.keys() - optional} for line in read_lines(results)]
    path = tmp_path / "least.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["study", "report", str(path), "--study", str(study_file), "--to", str(tmp_path / "report")])
    assert "## Training" in (tmp_path / "report" / "report.md").read_text()
