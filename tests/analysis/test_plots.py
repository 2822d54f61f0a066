"""Figures show the numbers of the metrics, labelled; text cannot break out of its HTML."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lrsa_lit.analysis import metrics, plots
from lrsa_lit.attention import LRSAConfig


class Words(HTMLParser):
    """Text of each word with the attributes of its span, and the styles of those about it; the legend comes first."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.parts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(dict(attrs))
        if tag == "div":
            self.parts.append([])

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        *about, attrs = self.open
        self.parts[-1].append((data, attrs, "".join(outer.get("style", "") for outer in about)))


def brightness(style):
    red, green, blue = (int(re.search(r"background: #(\w{6})", style)[1][i : i + 2], 16) for i in (0, 2, 4))
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_text_is_darker_where_more_heads_kept_it(drawn):
    record = drawn((70,))
    sample, region = record.samples[0], record.compressed(record.samples[0])
    shares = record.kept(sample).mean(axis=(0, 1))
    legend, words = Words(plots.context_html(record)).parts
    assert [text for text, *_ in words] == record.tokens(sample)
    shown = [brightness(attrs["style"]) for _, attrs, _ in words[region]]
    order = np.argsort(shares, kind="stable")
    assert (np.diff(np.array(shown)[order]) <= 0).all()
    assert len(set(shown)) == len(set(shares)) > 2
    boxes = {word: attrs["style"].partition(";")[0] for word, attrs, _ in legend if "border: 2px" in str(attrs)}
    for t, (_, attrs, about) in enumerate(words):
        assert (attrs["title"] == "never compressed") == (not region.start <= t < region.stop)
        assert (boxes["gold passage"] in about) == any(a <= t < b for a, b in sample.gold_spans)
        assert (boxes["answer"] in about) == any(a <= t < b for a, b in sample.answer_spans)
        assert ("bold" in about) == (boxes["answer"] in about)


def test_what_no_head_kept_is_white_and_what_all_kept_is_dark(drawn):
    record = drawn((70,), layers=1, heads=1)
    words = Words(plots.context_html(record)).parts[1][record.compressed(record.samples[0])]
    shown = {attrs["title"]: brightness(attrs["style"]) for _, attrs, _ in words}
    assert shown.keys() == {"kept by 0% of the heads", "kept by 100% of the heads"}
    assert shown["kept by 0% of the heads"] == 255
    assert shown["kept by 100% of the heads"] < 60


def test_passages_side_by_side_have_a_box_each(drawn):
    record = drawn((70,), gold=((4, 20), (20, 30)), answer=())
    _, text = plots.context_html(record).split("</div>", 1)
    assert text.count("border: 2px") == 2


def test_text_cannot_break_out(drawn):
    record = drawn((30,))
    record.texts[int(record.samples[0].token_ids[5])] = "</span><script>alert(1)</script>"
    parsed = Words(plots.context_html(record))
    assert set(parsed.tags) == {"div", "span"}


@pytest.mark.parametrize("length", [70, 1500], ids=["short", "longer-than-the-screen"])
def test_positions_shows_the_share_of_heads(drawn, length, tmp_path):
    record = drawn((length,), rule=LRSAConfig(sink_size=2, lag_size=8, top_k=3, dense_layers=(1,)))
    figure = plots.positions(record)
    figure.savefig(tmp_path / "f.png")
    marks, axes, bar = figure.axes
    np.testing.assert_array_equal(axes.images[0].get_array(), record.kept(record.samples[0]).mean(axis=1))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"], "layers are named, not counted"
    assert "tokens" in axes.get_xlabel()
    assert "share" in bar.get_ylabel()
    spans = record.samples[0].gold_spans
    shown = [path.vertices[:, 0] for path in marks.collections[0].get_paths()]
    assert [(x.min() + 0.5, x.max() + 0.5) for x in shown] == list(spans)
    boxes = [(box.get_x() + 0.5, box.get_x() + 0.5 + box.get_width()) for box in axes.patches]
    assert boxes == [*spans, *record.samples[0].answer_spans]
    assert axes.images[0].cmap(0.0) == (1, 1, 1, 1)
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["gold passage", "answer", "kept by no head", "never compressed"]


def test_a_sample_too_short_to_be_compressed_is_still_drawn(drawn, tmp_path):
    record = drawn((9,))
    assert plots.context_html(record).count("never compressed") == 9
    for figure in (plots.positions(record), plots.survival_by_layer([record]), plots.kinds([record])):
        figure.savefig(tmp_path / "f.png")
        assert all(not axes.images for axes in figure.axes)


def test_survival_is_drawn_against_chance(drawn):
    records = [drawn(seed=seed, step=seed) for seed in range(2)]
    gold, answer = plots.survival_by_layer(records).axes
    for axes, evidence in ((gold, "gold"), (answer, "answer")):
        lines = axes.get_lines()
        np.testing.assert_array_equal(lines[0].get_ydata(), metrics.survival(records[0], evidence).by_head.mean(axis=1))
        np.testing.assert_array_equal(lines[1].get_ydata(), metrics.survival(records[1], evidence).by_head.mean(axis=1))
        assert [line.get_ydata() for line in lines[2:]] == [[3 / 8, 3 / 8]]
    assert "38 tokens" in gold.get_title("left")
    assert lines[0].get_color() != lines[1].get_color()


def test_places_are_drawn_against_chance(drawn, tmp_path):
    records = [drawn(seed=seed, step=seed) for seed in range(2)]
    figure = plots.by_place(records)
    figure.savefig(tmp_path / "f.png")
    (axes,) = figure.axes
    lines = axes.get_lines()
    for line, record in zip(lines, records, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), metrics.by_place(record, 8).mean(axis=0))
    assert [line.get_ydata() for line in lines[2:]] == [[3 / 8, 3 / 8]]
    assert len(axes.collections) == 2


def test_kinds_stand_beside_their_share_of_the_text(drawn):
    record = drawn()
    (axes,) = plots.kinds([record]).axes
    of_all, of_kept = metrics.kinds_kept(record)
    assert [bar.get_height() for bar in axes.patches] == [*of_all, *of_kept]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(metrics.KINDS)


def test_agreement_and_change(drawn):
    first, second = drawn(seed=0), drawn(seed=1, step=5)
    image = plots.agreement(first).axes[0].images[0].get_array()
    np.testing.assert_array_equal(image, metrics.agreement(first))
    (axes,) = plots.change(first, second).axes
    kappa = metrics.agreement_between(first, second)
    np.testing.assert_array_equal(axes.get_lines()[2].get_ydata(), kappa.mean(axis=1))
    assert [text.get_text() for text in axes.texts] == ["tiny L8 K3, step 0 against step 5; 1: the same, 0: chance"]


def test_axes_of_scores_go_from_0_to_1(drawn):
    first, second = drawn(seed=0), drawn(seed=1)
    figures = [plots.survival_by_layer([first]), plots.by_place([first]), plots.kinds([first])]
    figures += [plots.f1_against(RULES, "kept_share", "K/L")]
    for axes in (axes for figure in figures for axes in figure.axes):
        assert axes.get_ylim() == plots.SCORES
    low, high = plots.change(first, second).axes[0].get_ylim()
    assert low <= 0.0
    assert high == plots.SCORES[1]


RULES = pd.DataFrame(
    {
        "model": ["a", "a", "b"],
        "lag_size": [32, 32, 32],
        "top_k": [16, 8, 8],
        "kept_share": [0.5, 0.25, 0.25],
        "f1": [0.6, 0.4, 0.3],
        "f1_low": [0.5, 0.2, 0.2],
        "f1_high": [0.65, 0.5, 0.5],
        "peak_memory_gib": [np.nan] * 3,
    }
)


def test_f1_has_a_line_for_each_model_and_lag_size():
    (axes,) = plots.f1_against(RULES, "kept_share", "kept share (K/L)").axes
    first, second = axes.containers
    assert first.lines[0].get_xydata().tolist() == [[0.25, 0.4], [0.5, 0.6]]
    assert second.lines[0].get_xydata().tolist() == [[0.25, 0.3]]
    bars = [segment[:, 1].tolist() for segment in first.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.2, 0.5], [0.5, 0.65]])
    assert axes.get_xlabel() == "kept share (K/L)"
    assert axes.get_title("left") == "F1 by kept share"
    assert [text.get_text() for text in axes.texts[:3]] == ["K8", "K16", "K8"]


def test_what_no_run_recorded_is_said_and_not_drawn():
    (axes,) = plots.f1_against(RULES, "peak_memory_gib", "peak memory (GiB)").axes
    assert not axes.containers
    assert "no run recorded peak_memory_gib" in [text.get_text() for text in axes.texts]


def test_differences_are_drawn_about_zero():
    pairs = pd.DataFrame([{"first": "m L8 K1", "second": "m L8 K2", "mean": 0.2, "low": -0.1, "high": 0.3}])
    (axes,) = plots.differences(pairs).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["K1 minus K2"]
    assert axes.texts[0].get_text().startswith("m L8; bars: 95 % CI")
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bar[:, 0], [-0.1, 0.3])
    assert any(line.get_xdata() == [0, 0] for line in axes.get_lines() if line.get_linestyle() == ":")


def test_every_figure_has_a_title_labelled_axes_and_readable_text(drawn):
    first, second = drawn(seed=0), drawn(seed=1, step=5)
    pairs = pd.DataFrame([{"first": "a", "second": "b", "mean": 0.2, "low": -0.1, "high": 0.3}])
    figures = [plots.positions(first), plots.survival_by_layer([first]), plots.by_place([first]), plots.kinds([first])]
    figures += [plots.agreement(first), plots.change(first, second), plots.gates([[0.0, 1.0]], "step 5")]
    figures += [plots.f1_against(RULES, "kept_share", "kept share (K/L)"), plots.differences(pairs)]
    for figure in figures:
        # Not the row of marks above the positions, nor a second panel beside the first.
        drawn_axes = [axes for axes in figure.axes if axes.get_xlabel()]
        assert figure.get_suptitle() or figure.axes[0].get_title("left")
        assert drawn_axes
        assert drawn_axes[0].get_ylabel() or drawn_axes[0].get_yticklabels()
        figure.draw_without_rendering()
        shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in shown) >= 10


def test_figures_leave_nothing_in_pyplot(drawn):
    from matplotlib import pyplot

    plots.positions(drawn())
    assert pyplot.get_fignums() == []
