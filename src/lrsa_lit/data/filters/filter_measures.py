"""What a filter has left of a split's contexts, in numbers: the counts of a data set's report as shares and means."""

from __future__ import annotations

from collections.abc import Mapping

MEASURES = {
    "context_tokens": "tokens of a context, mean",
    "context_tokens_left": "tokens left, mean",
    "supporting_recall": "supporting sentences left whole, share",
    "answers_left": "answers still in their context, share",
    "sentences_left": "sentences left whole, share",
    "without_context": "questions left without context, share",
    "without_summary": "passages that have no summary, share",
}
"""Labels of the measures, by the names that metrics have behind ``SPLIT/context/``."""
_RATIOS = {
    "context_tokens": ("context tokens", "filtered"),
    "context_tokens_left": ("context tokens left", "filtered"),
    "supporting_recall": ("supporting sentences left", "supporting sentences"),
    "answers_left": ("answers left", "answers"),
    "sentences_left": ("sentences left", "sentences"),
    "without_context": ("filtered without context", "filtered"),
    "without_summary": ("passages without a summary", "passages"),
}


def context_measures(report: Mapping[str, int], part: str = "") -> dict[str, float]:
    """The measures of a split's report, of a data set of a mixture where one is named; empty without a filter.

    Shares are of all sentences or answers of the split together. What there is none of has no measure.
    """
    stem = f"{part}/" if part else ""
    counts = {name: (report.get(stem + of, 0), report.get(stem + all_of, 0)) for name, (of, all_of) in _RATIOS.items()}
    return {name: of / all_of for name, (of, all_of) in counts.items() if all_of}


def filtered_parts(report: Mapping[str, int]) -> list[str]:
    """The data sets of a mixture whose contexts a filter has shortened; [""] for one data set, [] without a filter."""
    return [name.removesuffix("filtered").removesuffix("/") for name in report if name.rpartition("/")[2] == "filtered"]


def metrics_of(report: Mapping[str, int], split: str) -> dict[str, float]:
    """The measures of a split as ``SPLIT/context/NAME``; of a mixture, each data set's behind its own name."""
    return {
        "/".join(filter(None, (split, "context", part, name))): value
        for part in filtered_parts(report)
        for name, value in context_measures(report, part).items()
    }
