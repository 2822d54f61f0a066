"""Measures of what a filter left of a split's contexts: shares and means computed from a data set's report."""

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
"""Labels of the measures, by their metric names after ``SPLIT/context/``."""
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
    """The measures of a split's report, or of one data set (``part``) of a mixture; empty without a filter.

    Shares are taken over all sentences or answers of the split. A measure whose total is 0 is left out.
    """
    stem = f"{part}/" if part else ""
    counts = {name: (report.get(stem + of, 0), report.get(stem + all_of, 0)) for name, (of, all_of) in _RATIOS.items()}
    return {name: of / all_of for name, (of, all_of) in counts.items() if all_of}


def filtered_parts(report: Mapping[str, int]) -> list[str]:
    """Names of a mixture's data sets with a filter; [""] for a single filtered data set, [] without a filter."""
    return [name.removesuffix("filtered").removesuffix("/") for name in report if name.rpartition("/")[2] == "filtered"]


def metrics_of(report: Mapping[str, int], split: str) -> dict[str, float]:
    """The measures of a split as ``SPLIT/context/NAME``; for a mixture, ``SPLIT/context/DATA_SET/NAME``."""
    return {
        "/".join(filter(None, (split, "context", part, name))): value
        for part in filtered_parts(report)
        for name, value in context_measures(report, part).items()
    }
