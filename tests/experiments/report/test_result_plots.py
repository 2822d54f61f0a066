"""The plot of a score against cache bytes, of few systems and of many."""

import pytest

from lrsa_lit.evaluation.statistics import Estimate
from lrsa_lit.experiments.report.result_plots import against_cache


@pytest.mark.parametrize("systems", [3, 31])
def test_the_best_system_is_named_first_and_few_have_intervals(systems):
    found = [
        (f"system {number}", share, Estimate(value, value - 0.01, value + 0.01))
        for number in range(systems)
        for share, value in ((0.25, 0.2 + 0.01 * number), (0.5, 0.1))
    ]
    (axes,) = against_cache(found, "F1", "a set").axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [f"system {number}" for number in reversed(range(systems))]
    with_intervals = [container.has_yerr for container in axes.containers]
    assert with_intervals == [systems == 3] * systems
