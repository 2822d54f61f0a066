"""The plots that a study names: which cells stand where, and what is refused."""

import pytest
from cli_helpers import refusal
from experiments import tiny_study
from experiments.report.lines import evaluation, evaluations, scores, study_of
from matplotlib.container import ErrorbarContainer

from lrsa_lit.experiments.report.cells import Cells
from lrsa_lit.experiments.report.named_plots import named_plot

PLOT = {"title": "A plot", "set": "plain", "x": "cache", "lines": {"one": [["lrsa", "4x"], ["dense", "dense"]]}}


def drawn(study, lines):
    """Each line's points, by its name, and the axes."""
    (axes,) = named_plot(Cells(study, lines), "p").axes
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    return {bar.get_label(): list(map(tuple, bar.lines[0].get_xydata().round(4))) for bar in bars}, axes


def study_with(tmp_path, **changes):
    return study_of(tmp_path, plots={"p": PLOT | changes})


def test_quality_stands_against_the_bytes_that_were_measured_or_that_the_rule_holds(tmp_path):
    study = study_with(tmp_path)
    lines = evaluations(study, ("dense", "dense", 0.8), ("lrsa", "4x", 0.6))
    held = (2 + 62 + 6 * 8) / 256
    assert drawn(study, lines)[0] == {"one": [(held, 0.6), (1.0, 0.8)]}
    lines[1]["measured"] = {"cache": 0.3, "pairs": 0.4, "kept": 0.2}
    assert drawn(study, lines)[0]["one"][0] == (0.3, 0.6)
    assert drawn(study_with(tmp_path, x="pairs"), lines)[0]["one"][0] == (0.4, 0.6)


def test_names_are_places_of_which_some_stay_empty(tmp_path):
    lines_of_plot = {"a": [["lrsa", "4x"], None], "b": [["lrsa", "8x"], ["dense", "dense"]]}
    study = study_with(tmp_path, x=["first", "second"], lines=lines_of_plot)
    points, axes = drawn(study, evaluations(study, ("dense", "dense", 0.8), ("lrsa", "4x", 0.6)))
    assert [round(x) for x, _ in points["a"] + points["b"]] == [0, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    assert axes.get_title("left") == "A plot"


def test_a_point_may_be_of_another_data_set(tmp_path):
    sets = tiny_study.STUDY["data_sets"] | {"long": tiny_study.STUDY["data_sets"]["plain"]}
    study = study_of(tmp_path, data_sets=sets, plots={
        "p": PLOT | {"x": "length", "lines": {"one": [["lrsa", "4x"], ["lrsa", "4x", "long"]]}}})  # fmt: skip
    lines = [evaluation(study, "lrsa", "4x", scores(0.5)),
             evaluation(study, "lrsa", "4x", scores(0.25), data_set="long", length=512)]  # fmt: skip
    assert drawn(study, lines)[0] == {"one": [(256.0, 0.5), (512.0, 0.25)]}


def test_without_results_there_is_no_plot(tmp_path):
    assert named_plot(Cells(study_with(tmp_path), []), "p") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": "memory"}, 'plots.p.x: "memory"'),
        ({"set": "none"}, "plots.p.set: 'none'"),
        ({"lines": {"one": [["spare", "4x"]]}}, "no row 'spare'"),
        ({"lines": {"one": [["lrsa", "9x"]]}}, "plots.p: there is no '9x' in inference"),
        ({"lines": {"one": [["lrsa", "4x", "none"]]}}, "plots.p.set: 'none'"),
        ({"lines": {}}, "plots.p.lines: {}"),
        ({"lines": {"one": ["lrsa"]}}, "plots.p.lines"),
        ({"x": ["one name"]}, "plots.p.lines: a line has more points than x has names (1)"),
        ({"colour": "red"}, "'colour'"),
    ],
)
def test_mistakes_are_named(changes, named, tmp_path, capfd):
    path = tiny_study.write(tmp_path / "study.yaml", plots={"p": PLOT | changes})
    assert named in refusal(capfd, "study", "config", str(path), "lrsa")
