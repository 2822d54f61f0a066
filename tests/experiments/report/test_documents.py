"""Blocks of Markdown files: what is filled, what is kept, and what is refused."""

import re
import stat
from pathlib import Path

import pytest
from cli_helpers import refusal
from experiments import tiny_study
from experiments.report.lines import evaluation, evaluations, scores, study_of, training
from experiments.report.test_named_plots import PLOT
from experiments.tiny_study import STUDY
from helpers import one_line, refused
from matplotlib.container import BarContainer

from lrsa_lit.analysis.survival import EvidenceSurvival
from lrsa_lit.cli.main import main
from lrsa_lit.cli.study import open_study
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import result_plots, tables
from lrsa_lit.experiments.report.document import Blocks, fill, filled, replace, results_of
from lrsa_lit.experiments.report.evidence import layers
from lrsa_lit.experiments.results import read_lines

ROOT = Path(__file__).parents[3]
PROSE = "# Title\r\n\r\nWritten by `<!-- study:none -->` hand.  \n"


def document(folder, *names, before=PROSE, after="The end, without a newline"):
    path = folder / "RESULTS.md"
    blocks = "between\n".join(f"<!-- study:{name} -->\nold\n<!-- /study -->\n" for name in names)
    path.write_bytes((before + blocks + after).encode())
    return path


def block(path, name):
    return re.search(rf"<!-- study:{name} -->\n(.*?)<!-- /study -->", path.read_text(), re.DOTALL)[1].strip()


def test_blocks_are_filled_and_all_else_is_kept(study_file, results, tmp_path):
    names = ("main", "bars", "all/plain", "training", "machines", "perplexity", "survival", "summary", "legend")
    path = document(tmp_path, *names, "main/plain/plot", "survival/plot", "perplexity/plot")
    prose = re.sub(rb"(?s)(<!-- study:\S+ -->\n).*?(<!-- /study -->)", rb"\1\2", path.read_bytes())
    command = ["study", "report", str(results), "--study", str(study_file), "--into", str(path)]
    main([*command, "--plots", str(tmp_path / "docs" / "study")])
    first = path.read_bytes()
    assert re.sub(rb"(?s)(<!-- study:\S+ -->\n).*?(<!-- /study -->)", rb"\1\2", first) == prose
    assert all(block(path, name) != "old" for name in names)
    matrix = block(path, "main")
    assert "| trained | seeds | dense | 4x |" in matrix
    own = next(line for line in read_lines(results) if (line["row"], line.get("attention")) == ("lrsa", "4x"))
    assert f"{sum(own['f1']) / 3:.3f} [" in next(line for line in matrix.splitlines() if line.startswith("| lrsa |"))
    assert block(path, "main/plain/plot").endswith("(docs/study/main-plain.png)")
    images = list((tmp_path / "docs" / "study").iterdir())
    assert sorted(image.name for image in images) == ["main-plain.png", "perplexity.png", "survival.png"]
    assert all(image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size < 150_000 for image in images)
    assert not (tmp_path / "study" / "report").exists()
    # Again: the same bytes, of the plots as well.
    before = {image: image.read_bytes() for image in images}
    main([*command, "--plots", str(tmp_path / "docs" / "study")])
    assert path.read_bytes() == first
    assert {image: image.read_bytes() for image in images} == before


@pytest.mark.parametrize(
    ("names", "after", "named"),
    [
        (["mian"], "", "'mian'"),
        (["main/text/plots"], "", "'main/text/plots'"),
        (["main/none"], "", "'main/none'"),
        (["main/plot"], "", "'main/plot'"),
        (["bars"], "<!-- study:main -->\n", "not closed"),
        (["bars"], "<!-- study:main -->\n<!-- study:bars -->\n<!-- /study -->\n", "'main' is not closed"),
        (["bars"], "<!-- /study -->\n", "closes nothing"),
        ([], "", "no block"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(names, after, named, study_file, tmp_path):
    study = open_study(str(study_file))
    good, bad = document(tmp_path, "main"), tmp_path / "bad.md"
    bad.write_bytes(document(tmp_path / ".", *names, after=after).read_bytes())
    good = document(tmp_path, "main", "main/plain/plot")
    before = good.read_bytes()
    lines = [evaluation(study, "dense", "dense", scores(0.5))]
    with pytest.raises(UserError) as error:
        fill(study, lines, [good, bad], tmp_path / "plots")
    assert named in one_line(error.value)
    assert "bad.md" in str(error.value)
    assert good.read_bytes() == before
    assert not (tmp_path / "plots").exists()


def test_documents_of_several_studies_name_theirs(study_file, results, tmp_path, capsys):
    other = tiny_study.write(tmp_path / "other.yaml", plots={"p": PLOT})
    (tmp_path / "none.jsonl").touch()
    pages = tmp_path / "pages"
    pages.mkdir()
    path = document(pages, "tiny-study:main", "other:claim", "tiny-study:main/plain/plot", "other:p/plot")
    command = ["study", "report", str(results), "none.jsonl", "--study", str(study_file), str(other)]
    main([*command, "--into", "pages", "--plots", "plots"])
    assert "| lrsa |" in block(path, "tiny-study:main")
    # Nothing of it has run, which its table says and its plot does not hide.
    assert block(path, "other:claim").count("| not run yet |") == len(STUDY["bars"])
    assert block(path, "other:p/plot") == ""
    assert [image.name for image in (tmp_path / "plots").iterdir()] == ["tiny-study-main-plain.png"]
    for mark, said in (("main", "tiny-study:NAME or other:NAME"), ("third:main", "'third:main'"),
                       ("other:mian", "'mian'")):  # fmt: skip
        document(pages, mark)
        assert said in refusal(capsys, *command, "--into", "pages")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a.jsonl", "--study", "S", "S"], "--study"),
        (["a.jsonl", "a.jsonl", "--study", "S"], "--study"),
        (["a.jsonl", "a.jsonl", "--study", "S", "S"], "--to"),
        (["a.jsonl", "none.jsonl", "--study", "S", "S", "--into", "doc.md"], "none.jsonl: no such file"),
        (["a.jsonl", "--study", "S", "--into", "empty"], "--into: empty has no Markdown file"),
    ],
)
def test_several_studies_need_results_each_and_documents(arguments, named, study_file, results, tmp_path, capsys):
    results.rename("a.jsonl")
    (tmp_path / "empty").mkdir()
    given = [str(study_file) if argument == "S" else argument for argument in arguments]
    assert named in refusal(capsys, "study", "report", *given)


def test_all_parts_stand_in_one_block(study_file, results):
    study = open_study(str(study_file))
    text = Blocks(study, results_of(study, results)).texts["parts"]()
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == [
        "main: plain (test)", "main: text (test)", "all: plain (test)"]  # fmt: skip
    assert Blocks(study, []).texts["parts"]() == ""


def test_tables_have_the_bytes_of_the_cache_where_any_were_measured(study_file):
    study = open_study(str(study_file))
    lines = evaluations(study, ("dense", "dense", 0.8), ("lrsa", "4x", 0.6))
    assert "| cache |" not in Blocks(study, lines).texts["main/plain"]()
    lines[1]["measured"] = {"cache": 0.3, "pairs": 0.4, "kept": 0.2}
    head, _, dense, lrsa = Blocks(study, lines).texts["main/plain"]().splitlines()[2:]
    assert "| kept | pairs | cache |" in head
    assert "| 100% | 100% | 100% |" in dense
    assert "| 20% | 40% | 30% |" in lrsa


def test_an_unknown_block_says_which_there_are(study_file, tmp_path):
    path = document(tmp_path, "mian")
    with refused(f"{path}, line 4") as caught:
        fill(open_study(str(study_file)), [], [path], tmp_path)
    assert re.search(r"summary, legend, bars.*PART/SET.*main, all", str(caught.value))


def test_a_missing_file_is_named(study_file, tmp_path):
    with refused(str(tmp_path / "none.md")):
        filled(tmp_path / "none.md", str)


def test_another_content_leaves_the_permissions_and_no_other_file(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("old")
    path.chmod(0o640)
    replace(path, b"new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with refused(str(path / "b.md")):
        replace(path / "b.md", b"")
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_measured_is_left_empty(study_file):
    study = open_study(str(study_file))
    blocks = Blocks(study, [evaluation(study, "lrsa", "4x", scores(0.5))])
    assert blocks.texts["main"]().splitlines()[2:] == [
        "1 of 4 results are in.", "", "| trained | seeds | dense | 4x |", "|---|---:|---:|---:|",
        f"| lrsa | 1 |  | {blocks.tables['main/plain'].entries[0].score.value:.3f} [0.430, 0.570] |"]  # fmt: skip
    for name in ("main/text", "summary", "bars", "perplexity", "survival"):
        assert blocks.texts[name]() == "", name
    for name in ("main/text/plot", "perplexity/plot", "survival/plot"):
        assert blocks.plots[name][1]() is None


def test_the_summary_says_what_is_kept_and_what_is_attended_to(study_file):
    study = open_study(str(study_file))
    cells = ("dense", "dense", 0.8), ("dense", "4x", 0.4), ("lrsa", "4x", 0.6)
    # A seed that only one side has would be compared with the order of the data.
    lines = evaluations(study, *cells, ("dense", "dense", 0.1, 1), ("dense", "4x", 0.1, 1))
    head, _, row, *_ = Blocks(study, lines).texts["summary"]().splitlines()
    assert head.endswith("| of dense | kept | pairs | seeds |")
    assert row.startswith("| at 4x | F1 | 0.800 | 0.400 | 0.600 | 75.0% [")
    assert row.endswith("] | 25% | 50% | 1 |")
    # Dense training may have been run under the rule in fewer seeds.
    del lines[-1]
    lines += evaluations(study, ("lrsa", "4x", 0.6, 1))
    row = Blocks(study, lines).texts["summary"]().splitlines()[2]
    assert row.startswith("| at 4x | F1 | 0.450 | 0.400 (1 seed) | 0.600 |")
    assert row.endswith("] | 25% | 50% | 2 |")


def test_the_best_of_several_budgets_stands_at_the_smallest_one(tmp_path):
    share = {"set": "plain", "of_dense": 0.5}
    bars = {"half": share | {"kept": 0.5}, "quarter": share | {"kept": 0.25}, "eighth": share | {"kept": 0.125},
            "all pairs": share | {"pairs": 0.5}}  # fmt: skip
    study = study_of(tmp_path, bars=bars)

    def shown(*cells):
        text = Blocks(study, evaluations(study, *cells)).texts["summary"]()
        return [line.split("|")[1].strip() for line in text.splitlines()[2:-3]]

    assert shown(("dense", "dense", 0.8), ("lrsa", "4x", 0.6)) == ["quarter"]
    assert shown(("dense", "dense", 0.8), ("lrsa", "4x", 0.6), ("lrsa", "8x", 0.5)) == ["quarter", "eighth"]


def test_a_part_says_how_much_of_it_there_is(study_file):
    study = open_study(str(study_file))
    whole = evaluations(study, *((row, name, 0.5) for row in ("dense", "lrsa") for name in ("dense", "4x")))
    assert "results are in" not in Blocks(study, whole).texts["main"]()
    assert "3 of 4 results are in." in Blocks(study, whole[1:]).texts["main"]()
    # Another seed than the part's is no part of it.
    other = [*whole[1:], *evaluations(study, ("dense", "dense", 0.5, 7))]
    assert "3 of 4 results are in." in Blocks(study, other).texts["main/plain"]()
    # Of seeds that the part does not ask for alone.
    assert Blocks(study, [{**line, "seed": 7} for line in whole]).texts["main"]() == ""


def test_hours_are_those_that_the_results_know(study_file):
    study = open_study(str(study_file))
    lines = [evaluation(study, "dense", "dense", scores(0.5), seconds=5400.0),
             evaluation(study, "dense", "4x", scores(0.5))]  # fmt: skip
    (row,) = Blocks(study, lines).texts["machines"]().splitlines()[2:]
    assert row == "| abacus | torch 2.0 | c0ffee | 0 | 0 | 2 | 1.5 (from 1 of 2 results) |"
    assert Blocks(study, lines[1:]).texts["machines"]().endswith("| 0 | 1 |  |")


def test_survival_stands_beside_that_of_the_base_model(study_file):
    study = open_study(str(study_file))
    kept = {"gold": 0.3, "answer": None, "chance": 0.25}
    lines = [
        evaluation(study, "base", "4x", scores(0.1), survival=kept),
        evaluation(study, "lrsa", "4x", scores(0.5), survival=kept | {"gold": 0.5}),
        evaluation(
            study, "lrsa", "4x", scores(0.5), seed=1, survival=kept | {"gold": 0.4, "quarters": [0.5, 0.3, 0.2, 0]}
        ),
        evaluation(study, "lrsa", "8x", scores(0.5), survival=kept),
    ]
    assert Blocks(study, lines).texts["survival"]().splitlines()[2:] == [
        "| plain | lrsa | 4x | 25% | 30% | 45% |  |  | 50% 30% 20% 0% |"]  # fmt: skip


def test_all_rows_under_an_attention_stand_on_one_line_of_the_plot(study_file):
    study = open_study(str(study_file))
    kept = {"gold": 0.3, "answer": None, "chance": 0.25}
    trained = [("lrsa", 0.5), ("dense", 0.25), ("mixed", None)]
    lines = [
        evaluation(study, "base", "4x", scores(0.1), survival=kept),
        *(evaluation(study, row, "4x", scores(0.5), survival=kept | {"gold": gold}) for row, gold in trained),
        # Nothing is chosen, so nothing can be kept by chance.
        evaluation(study, "base", "8x", scores(0.1), survival=kept | {"gold": 0.0, "chance": 0.0}),
        evaluation(study, "lrsa", "8x", scores(0.1), survival=kept | {"gold": 0.0, "chance": 0.0}),
    ]
    (axes,) = Blocks(study, lines).plots["survival/plot"][1]().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain: 4x"]
    _, before, after = axes.get_lines()
    assert before.get_ydata().tolist() == after.get_ydata().tolist() == [0, 0]
    assert before.get_xdata().tolist() == pytest.approx([1.2, 1.2])
    assert after.get_xdata().tolist() == pytest.approx([1.0, 2.0])


def test_the_seeds_of_a_row_have_one_colour_and_one_name():
    asked = [("lrsa", 0), ("dense", 0), ("lrsa", 1), ("dense", 1)]
    lines = [training(row=row, seed=seed, losses=[2.0, 1.0]) for row, seed in asked]
    (axes,) = result_plots.training_curves([*lines, training(row="old")]).axes
    colours = [line.get_color() for line in axes.get_lines()]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert axes.get_legend_handles_labels()[1] == ["lrsa", "dense"]


def test_a_layer_is_held_against_the_same_rule_without_it(tmp_path):
    inference = {**STUDY["inference"], "only": {"top_k": 4, "dense_layers": {"only": 2}}}
    parts = {"layers": {"rows": ["dense"], "inference": ["8x", "4x", "dense", "only-*"], "sets": ["plain"],
                        "generate": False}}  # fmt: skip
    study = study_of(tmp_path, inference=inference, parts=parts)
    assert study.inference["only-0"].top_k == study.inference["8x"].top_k != study.inference["4x"].top_k
    losses = {"8x": [3.0, 5.0], "4x": [9.0, 9.0], "dense": [0.0, 0.0], "only-0": [3.0, 4.0], "only-1": [1.0, 2.0]}
    lines = [evaluation(study, "dense", name, [0.0, 0.0], loss=loss, tokens=[1, 3], generated=False)
             for name, loss in losses.items()]  # fmt: skip
    blocks = Blocks(study, lines)
    found = layers(blocks.tables["layers/plain"])
    # By tokens: 0 + 1 of 4, and 2 + 3 of 4; each draw takes the same questions on both sides.
    assert [(*item[:4], item.gain.value) for item in found] == [
        ("dense", "8x", (), 0, 0.25), ("dense", "8x", (), 1, 1.25)]  # fmt: skip
    assert found[1].gain.low == pytest.approx(1.0)
    assert found[1].gain.high == pytest.approx(2.0)
    (axes,) = blocks.plots["layers/plain/plot"][1]().axes
    assert bars(axes) == {"0": 0.25, "1": 1.25}
    assert axes.get_xlabel() == "layer that is dense"
    assert axes.get_ylabel() == "fall of the answer loss\n(nats per token)"
    assert axes.texts[0].get_text() == "layers: plain; dense under 8x; other dense layers: none; bars: 95 % CI"
    # Another seed than the base's says nothing of the layer.
    assert layers(Blocks(study, [lines[0], {**lines[3], "seed": 1}]).tables["layers/plain"]) == []
    assert Blocks(study, lines[1:]).plots["layers/plain/plot"][1]() is None


def bars(axes):
    """Heights of the bars by their names."""
    (drawn,) = (each for each in axes.containers if isinstance(each, BarContainer))
    names = [label.get_text() for label in axes.get_xticklabels()]
    return dict(zip(names, [bar.get_height() for bar in drawn], strict=True))


def test_layers_are_held_against_the_base_that_most_others_have(tmp_path):
    inference = {
        "8x": {"top_k": 4},
        "only": {"top_k": 4, "dense_layers": {"only": 4}},
        "pair": {"top_k": 4, "dense_layers": [0, 1]},
        "two": {"top_k": 4, "dense_layers": [1, 3]},
        "also": {"top_k": 4, "dense_layers": {"only": 4, "beside": [1, 3]}},
        "other": {"top_k": 2, "dense_layers": [1, 3]},
        "other-0": {"top_k": 2, "dense_layers": [0, 1, 3]},
    }
    names = ["pair", "also-*", "other-0", "other", "only-*", "two", "8x", "dense"]
    parts = {"layers": {"rows": ["dense", "lrsa"], "inference": names, "sets": ["plain"], "generate": False}}
    study = study_of(tmp_path, inference={"dense": None, **inference}, parts=parts, bars={})
    losses = {"8x": 9.0, "only-0": 8.0, "only-1": 5.0, "only-2": 9.5, "only-3": 6.0, "pair": 4.0, "two": 3.0,
              "also-0": 2.5, "also-2": 2.75, "other": 2.0, "other-0": 1.0, "dense": 0.5}  # fmt: skip
    # also-0 has a layer more than pair and than two, which serves also-2 as well; only-1 serves both pair and two.
    lines = [evaluation(study, row, name, [0.0, 0.0], loss=[loss * more] * 2, tokens=[1, 1], generated=False)
             for name, loss in losses.items() for row, more in (("dense", 1), ("lrsa", 2))]  # fmt: skip
    blocks = Blocks(study, lines)
    found = layers(blocks.tables["layers/plain"])
    assert {item[1:4]: item.gain.value for item in found if item.row == "dense"} == {
        ("two", (1, 3), 0): 0.5, ("two", (1, 3), 2): 0.25, ("other", (1, 3), 0): 1.0,
        ("8x", (), 0): 1.0, ("8x", (), 1): 4.0, ("8x", (), 2): -0.5, ("8x", (), 3): 3.0,
        ("only-1", (1,), 0): 1.0, ("only-1", (1,), 3): 2.0}  # fmt: skip
    assert len(found) == 18
    figure = blocks.plots["layers/plain/plot"][1]()
    assert [tuple(axes.texts[0].get_text().split("; ")[:3]) for axes in figure.axes[:4]] == [
        ("layers: plain", f"dense under {base}", f"other dense layers: {others}")
        for base, others in (("only-1", "1"), ("two", "1, 3"), ("other", "1, 3"), ("8x", "none"))]  # fmt: skip
    assert bars(figure.axes[0]) == {"0": 1.0, "3": 2.0}
    assert bars(figure.axes[5]) == {"0": 1.0, "2": 0.5}


def test_texts_have_no_plot_of_layers(tmp_path):
    part = {**STUDY["parts"]["main"], "inference": ["4x", "one"]}
    inference = {**STUDY["inference"], "one": {"dense_layers": [0]}}
    study = study_of(tmp_path, inference=inference, parts={"main": part}, bars={})
    lines = [evaluation(study, "dense", name, [0.0, 0.0], data_set="text", generated=False) for name in ("4x", "one")]
    blocks = Blocks(study, lines)
    assert len(layers(blocks.tables["main/text"])) == 1
    assert blocks.plots["main/text/plot"][1]() is None
    assert blocks.plots["main/text/plot"][0] == "main/text: perplexity"
    assert blocks.plots["main/plain/plot"][0] == "main/plain: the score against the share of pairs attended to"


def test_the_legend_says_of_how_many_questions_selections_are_looked_at():
    assert f"over the first {EvidenceSurvival().questions} questions." in " ".join(tables.LEGEND.split())


def test_perplexity_of_texts_is_by_tokens(tmp_path):
    study = study_of(tmp_path)
    line = evaluation(study, "dense", "4x", [0.0, 0.0], data_set="text")
    line |= {"f1": [], "em": [], "recall": [], "loss": [1.0, 5.0], "tokens": [1, 2]}
    (row,) = Blocks(study, [line]).texts["perplexity"]().splitlines()[2:]
    assert row == "| text | dense | 4x | 1 | 25% | 50% | 7.39 [2.72, 12.18] |"


def test_a_comparison_at_budgets_has_a_table_and_a_plot(study_file):
    half = "Kept-at-50-of-100"
    changes = {"inference": STUDY["inference"] | {half: {"top_k": 2}}}
    # What is evaluated first stays where it is in the study.
    parts = {"plain": {"rows": ["dense"], "inference": [half, "dense"], "sets": ["plain"]}}
    study = open_study(str(tiny_study.write(study_file, **changes, parts=parts, bars={})))
    lines = evaluations(study, ("dense", "dense", 0.8), ("dense", half, 0.6))
    for line, held in zip(lines, (1.0, 0.5), strict=True):
        line["measured"] = {"cache": held}
    blocks = Blocks(study, lines)
    head, _, dense, kept = blocks.texts["plain/plain/budgets"]().splitlines()[-4:]
    assert head.startswith("| system | budget |")
    assert dense.startswith("| dense |")
    assert kept.startswith("| Kept | 50% |")
    _, draw = blocks.plots["plain/plain/budgets/plot"]
    assert draw() is not None
    assert Blocks(study, []).texts["plain/plain/budgets"]() == Blocks(study, []).texts["budgets-legend"]() == ""
    _, draw = Blocks(study, []).plots["plain/plain/budgets/plot"]
    assert draw() is None
