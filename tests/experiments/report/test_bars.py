"""Bars on results whose answer is known."""

import pytest
from cli_helpers import refusal
from experiments import tiny_study
from experiments.report.lines import evaluation, evaluations, study_of
from experiments.shipped_studies import SHIPPED, opened
from experiments.tiny_study import STUDY
from helpers import one_line

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report.bars import Bars, claim_of, table_of
from lrsa_lit.experiments.report.cells import Cells


def verdict(study, *cells):
    (found,) = Bars(Cells(study, evaluations(study, *cells))).verdicts()
    return found


@pytest.mark.parametrize(
    ("lrsa", "wanted"), [(0.79, "met"), (0.61, "met, not significantly"), (0.59, "**missed**, not significantly"),
                         (0.3, "**missed**")])  # fmt: skip
def test_a_share_of_dense_training_is_that_of_the_best(lrsa, wanted, tmp_path):
    study = study_of(tmp_path, bars={"b": {"set": "plain", "kept": 0.25, "of_dense": 0.75}})
    found = verdict(study, ("dense", "dense", 0.8), ("lrsa", "4x", lrsa), ("mixed", "4x", 0.2), ("lrsa", "dense", 0.9),
                    ("dense", "4x", 1.0), ("base", "4x", 1.0), ("lrsa", "random-4x", 1.0))  # fmt: skip
    assert found.verdict == wanted
    assert table_of([found]).frame()["verdict"].tolist() == [wanted.replace("**", "")]
    assert found.reached.startswith(f"{lrsa / 0.8:.1%} [")
    # Neither dense attention nor dense training counts, nor the untrained model, nor another choice of tokens.
    assert found.by.startswith("lrsa under 4x (kept 25.0%, pairs 50.0%), compared with dense, 1 seed; best of 2, ")


def test_what_keeps_too_much_does_not_count(tmp_path):
    bar = {"set": "plain", "kept": 0.125, "of_dense": 0.5}
    cells = ("dense", "dense", 0.8), ("lrsa", "4x", 0.8), ("lrsa", "8x", 0.2)
    assert verdict(study_of(tmp_path, bars={"b": bar}), *cells).by.startswith("lrsa under 8x")
    # All that is attended to, windows included, is more.
    study = study_of(tmp_path, bars={"b": {"set": "plain", "pairs": 0.125, "of_dense": 0.5}})
    assert verdict(study, *cells).verdict == "open"


def test_the_best_of_several_is_checked_on_questions_that_it_was_not_chosen_on(tmp_path):
    study = study_of(tmp_path, bars={"b": {"set": "plain", "kept": 0.25, "of_dense": 0.5}})
    # One answers the even questions, the other the odd ones: whichever half chooses, the other half has nothing.
    even, odd = [[float(number % 2 == half) for number in range(100)] for half in (0, 1)]
    lines = [evaluation(study, "dense", "dense", [1.0] * 100), evaluation(study, "lrsa", "4x", even),
             evaluation(study, "mixed", "4x", odd)]  # fmt: skip
    best = Bars(Cells(study, lines)).best(study.bars["b"])
    assert best.ratio.value == 0.5
    assert best.ratio_apart == 0.0
    assert Bars(Cells(study, lines[:2])).best(study.bars["b"]).ratio_apart is None


def test_the_best_is_one_of_those_with_the_most_seeds(tmp_path):
    bar = {"set": "plain", "kept": 0.25, "of_dense": 0.5}
    dense = [("dense", "dense", share, seed) for seed, share in enumerate((0.8, 0.6))]
    lucky, steady = ("mixed", "4x", 0.9, 0), [("lrsa", "4x", 0.5, seed) for seed in (0, 1)]
    found = verdict(study_of(tmp_path, bars={"b": bar}), *dense, lucky, *steady)
    assert found.reached.startswith(f"{0.5 / 0.7:.1%} [")
    assert found.by == "lrsa under 4x (kept 25.0%, pairs 50.0%), compared with dense, 2 seeds"
    # What is asked of dense training is asked of the seeds that count, and other seeds are no reference.
    strong = bar | {"reference_at_least": {"em": 0.75}}
    assert verdict(study_of(tmp_path, bars={"b": strong}), *dense, steady[0]).verdict != "open"
    assert verdict(study_of(tmp_path, bars={"b": strong}), *dense, *steady).verdict == "open"
    assert verdict(study_of(tmp_path, bars={"b": bar}), dense[1], lucky).verdict == "open"


def test_a_seed_more_than_the_study_has_puts_no_other_row_aside(tmp_path):
    study = study_of(tmp_path, bars={"b": {"set": "plain", "kept": 0.25, "of_dense": 0.5}})
    assert study.seeds == [0, 1]
    dense, often = [[(row, attention, share, seed) for seed in range(3)]
                    for row, attention, share in (("dense", "dense", 0.8), ("lrsa", "4x", 0.4))]  # fmt: skip
    better = [("mixed", "4x", 0.7, seed) for seed in range(2)]
    assert verdict(study, *dense, *often, *better).by.startswith("mixed under 4x")
    assert verdict(study, *dense, *often, better[0]).by.startswith("lrsa under 4x")


def test_only_a_strong_reference_counts(tmp_path):
    bar = {"set": "plain", "kept": 0.25, "of_dense": 0.9}
    cells = ("dense", "dense", 0.5), ("lrsa", "4x", 0.5)
    # All draws of questions give 1: a bootstrap that knows no error.
    assert verdict(study_of(tmp_path, bars={"b": bar}), *cells).verdict == "met, not significantly"
    found = verdict(study_of(tmp_path, bars={"b": bar | {"reference_at_least": {"em": 0.6}}}), *cells)
    assert (found.verdict, found.required) == (
        "open", "90% of dense plain F1, 0.25 kept, dense exact match at least 0.6")  # fmt: skip
    assert verdict(study_of(tmp_path, bars={"b": bar | {"reference_at_least": {"em": 0.5}}}), *cells).verdict != "open"
    assert verdict(study_of(tmp_path, bars={"b": bar | {"reference": ["base"]}}), *cells).verdict == "open"
    assert verdict(study_of(tmp_path, bars={"b": bar | {"reference": ["base", "dense"]}}), *cells).verdict != "open"


def test_sinks_and_window_alone_are_no_selection(tmp_path):
    rows = STUDY["rows"] | {"none": {"model": {"train_attention": {"top_k": 0}}}}
    bars = {"b": {"set": "plain", "kept": 0.25, "of_dense": 0.5}}
    study = study_of(tmp_path, rows=rows, inference=STUDY["inference"] | {"none": {"top_k": 0}}, bars=bars)
    cells = ("dense", "dense", 0.8), ("none", "none", 0.8), ("none", "4x", 0.8), ("lrsa", "none", 0.8)
    assert verdict(study, *cells).verdict == "open"
    assert verdict(study, *cells, ("lrsa", "4x", 0.4)).by.startswith("lrsa under 4x")


def test_a_score_is_that_of_the_best_row(tmp_path):
    bar = {"set": "plain", "row": ["dense", "lrsa"], "inference": "dense", "measure": "em", "at_least": 0.5}
    found = verdict(study_of(tmp_path, bars={"b": bar}), ("dense", "dense", 0.3), ("lrsa", "dense", 0.8))
    assert (found.verdict, found.by) == ("met", "lrsa under dense, 1 seed; best of 2")
    assert found.required == "plain exact match at least 0.5"
    assert found.reached.startswith("0.800 [")


OF = {"set": "plain", "row": "lrsa", "inference": "dense", "of": ["dense", "dense"], "at_least": 0.96}


@pytest.mark.parametrize(
    ("cells", "wanted", "reached"),
    [
        ([("lrsa", "dense", 0.6), ("lrsa", "dense", 0.6, 1)], "open", ""),
        ([("dense", "dense", 0.5), ("lrsa", "dense", 0.6)], "met", "120"),
        ([("dense", "dense", 0.5), ("lrsa", "dense", 0.4), ("lrsa", "dense", 0.9, 1)], "**missed**", "80"),
    ],
    ids=["nothing to compare", "met", "of the seeds of both"],
)
def test_a_score_is_held_against_that_of_another_cell(cells, wanted, reached, tmp_path):
    found = verdict(study_of(tmp_path, bars={"b": OF}), *cells)
    assert found.required == "96% of plain F1 of dense under dense"
    assert found.verdict.startswith(wanted)
    assert found.reached.startswith(reached)


def test_the_best_of_several_rows_is_held_against_the_best_of_several_cells(tmp_path):
    bar = OF | {"row": ["lrsa", "mixed"], "of": [["dense", "dense"], ["base", "dense"]], "aim": 1.0}
    cells = ("dense", "dense", 0.4), ("base", "dense", 0.8), ("lrsa", "dense", 0.2), ("mixed", "dense", 0.6)
    found = verdict(study_of(tmp_path, bars={"b": bar}), *cells)
    assert found.required == "96% of plain F1 of the best of dense under dense or base under dense"
    assert found.reached.startswith("75.0% [")
    assert found.by.startswith("mixed under dense, 1 seed; best of 2, ")
    assert found.aim == "100%"
    # Of one seed the best is the luckiest; and so is the best of what it is held against.
    more = ("lrsa", "dense", 0.2, 1), ("dense", "dense", 0.4, 1)
    found = verdict(study_of(tmp_path, bars={"b": bar}), *cells, *more)
    assert found.reached.startswith("50.0% [")
    assert found.by == "lrsa under dense, 2 seeds"


def test_shares_that_are_asked_of_rows_stand_in_the_summary_unless_inference_is_dense(tmp_path):
    bar = OF | {"inference": "4x"}
    study = study_of(tmp_path, bars={"at 4x": bar, "dense is kept": OF})
    cells = ("dense", "dense", 0.8), ("dense", "4x", 0.4), ("lrsa", "4x", 0.6), ("lrsa", "dense", 0.7)
    _, _, *rows = Bars(Cells(study, evaluations(study, *cells))).summary().markdown().splitlines()
    assert len(rows) == 1
    assert rows[0].startswith("| at 4x | F1 | 0.800 | 0.400 | 0.600 | 75.0% [")


def test_what_holds_more_than_a_bar_allows_does_not_count(tmp_path):
    bar = OF | {"row": ["lrsa", "mixed"], "inference": "own", "cache": 0.3}
    study = study_of(tmp_path, bars={"b": bar})
    lines = [evaluation(study, "dense", "dense", [1.0] * 10)]
    for row, score, cache in (("lrsa", 1.0, 0.31), ("mixed", 0.0, 0.304)):
        taken = {"cache": cache, "pairs": 0.4, "kept": 0.2}
        lines.append(evaluation(study, row, "own", [score] * 10, measured=taken))
    (found,) = Bars(Cells(study, lines)).verdicts()
    assert found.by == "mixed under own, 1 seed"
    assert found.required.endswith(", 0.3 of dense bytes")
    row = claim_of([found]).markdown().splitlines()[2]
    assert "| 40% | 30.4% | **missed** |" in row
    (found,) = Bars(Cells(study, lines[:2])).verdicts()
    assert (found.verdict, found.by) == ("**missed**", "lrsa under own holds 31% of dense bytes")


def test_the_table_of_the_claim_says_which_bars_were_not_run(tmp_path):
    study = study_of(tmp_path)
    text = claim_of(Bars(Cells(study, evaluations(study, ("dense", "dense", 0.95)))).verdicts()).markdown()
    assert [line.split("|")[3:9:5] for line in text.splitlines()[2:]] == [
        [" 50% of F1 ", " not run yet "], [" F1 of 0.9 ", " met "],
        [" F1 above each of 2, p < 0.01 ", " not run yet "]]  # fmt: skip


def test_what_a_rule_holds_is_known_without_a_measurement(tmp_path):
    study = study_of(tmp_path)
    cells = Cells(study, evaluations(study, ("lrsa", "4x", 0.5), ("lrsa", "dense", 0.5))).on("plain").cells()
    # Of 256 tokens 2 sinks, a window of 62 and 8 of each of the six partitions between.
    assert [cell.cache for cell in cells] == [pytest.approx((2 + 62 + 6 * 8) / 256), 1.0]


def test_a_bar_names_a_row_that_no_part_trains(tmp_path, capfd):
    bars = {"b": {"set": "plain", "row": "spare", "inference": "4x", "at_least": 0.5}}
    rows = STUDY["rows"] | {"spare": {"trainer": {"max_steps": 4}}}
    path = tiny_study.write(tmp_path / "study.yaml", rows=rows, bars=bars)
    told = refusal(capfd, "study", "run", str(path), "--part", "main")
    assert "bars.b: no part trains row 'spare'" in told


ABOVE = {"set": "plain", "row": "lrsa", "inference": "4x", "above": [["dense", "4x"], ["lrsa", "random-4x"]], "p": 0.01}


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([], "open"),
        ([("dense", "4x", 0.4)], "open"),
        ([("dense", "4x", 0.4), ("lrsa", "random-4x", 0.3)], "met"),
        ([("dense", "4x", 0.59), ("lrsa", "random-4x", 0.3)], "**missed**"),
        ([("dense", "4x", 0.9), ("lrsa", "random-4x", 0.3)], "**missed**"),
        ([("dense", "4x", 0.9)], "**missed**"),
        # Of another seed alone: these are not the same weights.
        ([("dense", "4x", 0.4), ("lrsa", "random-4x", 0.3, 1)], "open"),
    ],
)
def test_a_gain_must_be_significant_over_each_other(cells, wanted, tmp_path):
    study = study_of(tmp_path, bars={"b": ABOVE})
    assert verdict(study, ("lrsa", "4x", 0.6), *cells).verdict == wanted


def test_a_gain_that_other_seeds_might_not_have_is_said(tmp_path):
    study = study_of(tmp_path, bars={"b": ABOVE | {"above": [["dense", "4x"]]}})
    seeds = [("lrsa", "4x", share, seed) for seed, share in enumerate((0.2, 0.6, 0.9))]
    found = verdict(study, *seeds, *[("dense", "4x", 0.3, seed) for seed in range(3)])
    assert found.verdict == "met, not significantly over seeds"


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [((0.6,), "open"), ((0.6, 0.6, 0.6), "met"), ((0.9, 0.9, 0.2), "**missed**"), ((0.1, 0.1, 0.1), "**missed**")],
)
def test_seeds_may_be_drawn_as_questions_are(scores, wanted, tmp_path):
    study = study_of(tmp_path, bars={"b": ABOVE | {"above": [["dense", "4x"]], "draw_seeds": True}})
    seeds = [("lrsa", "4x", share, seed) for seed, share in enumerate(scores)]
    found = verdict(study, *seeds, *[("dense", "4x", 0.3, seed) for seed in range(len(scores))])
    assert found.verdict == wanted
    assert "over questions and seeds" in found.required


def test_one_models_attentions_are_compared_on_the_seeds_of_both(tmp_path):
    study = study_of(tmp_path)
    own = [("lrsa", "4x", share, seed) for seed, share in ((1, 0.9), (0, 0.5), (2, 0.7))]
    other = [("lrsa", "random-4x", share, seed) for seed, share in ((0, 0.4), (2, 0.6))]
    one, two = Cells(study, evaluations(study, *own, *other)).on("plain").cells()
    found = one.compared(two, "f1").difference
    assert found.value == pytest.approx(0.1)
    assert 0.05 < found.low < found.high < 0.15


@pytest.mark.parametrize(
    ("bar", "named"),
    [
        ({"set": "plain", "kept": 0.5}, "set, kept, of_dense"),
        ({"set": "plain", "kept": 0.5, "pairs": 0.5, "of_dense": 0.5}, "bars.b"),
        (None, "bars.b: it must be"),
        ({"set": "none", "kept": 0.5, "of_dense": 0.5}, "'none'"),
        ({"set": "text", "kept": 0.5, "of_dense": 0.5}, "'loss'"),
        ({"set": "plain", "kept": "half", "of_dense": 0.5}, 'bars.b.kept: "half"'),
        ({"set": "plain", "kept": 0.5, "of_dense": 0.5, "reference": ["none"]}, "'none'"),
        ({"set": "plain", "kept": 0.5, "of_dense": 0.5, "reference": "dense"}, 'bars.b.reference: "dense"'),
        ({"set": "plain", "kept": 0.5, "of_dense": 0.5, "reference_at_least": 0.5}, "bars.b.reference_at_least: 0.5"),
        ({"set": "plain", "kept": 0.5, "of_dense": 0.5, "reference_at_least": {"em": "x"}}, '{"em": "x"}'),
        ({"set": "plain", "kept": 0.5, "of_dense": 0.5, "reference_at_least": {"x": 1}}, 'at_least: {"x": 1}'),
        (ABOVE | {"row": "none"}, "'none'"),
        (OF | {"of": ["dense", "none"]}, "'none'"),
        (OF | {"of": "dense"}, 'bars.b.of: "dense" is not allowed; it must be [row, inference]'),
        (ABOVE | {"above": [["dense", "none"]]}, "'none'"),
        (ABOVE | {"above": ["dense"]}, "bars.b.above"),
        (ABOVE | {"above": None}, "bars.b.above: null is not allowed"),
        (ABOVE | {"row": 3}, "bars.b.row: 3"),
        (ABOVE | {"inference": ["4x"]}, 'bars.b.inference: ["4x"]'),
        ({"set": ["plain"], "kept": 0.5, "of_dense": 0.5}, '["plain"]'),
    ],
)
def test_mistakes_are_named(bar, named, tmp_path):
    with pytest.raises(UserError) as error:
        Bars(Cells(study_of(tmp_path, bars={"b": bar}), []))
    assert named in one_line(error.value)


def test_the_shipped_bars_are_complete():
    study = opened(SHIPPED)
    assert study.bars
    assert {item.verdict for item in Bars(Cells(study, [])).verdicts()} == {"open"}
