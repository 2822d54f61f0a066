"""A table, at the end of an evaluation, of what a context filter left."""

from __future__ import annotations

from rich.table import Table

from lrsa_lit.data.filters.filter_measures import MEASURES, context_measures, filtered_parts
from lrsa_lit.data.module import QADataModule, Split


def filter_tables(data: QADataModule, split: Split) -> list[Table]:
    """A table with one column per filtered data set; an empty list without a filter."""
    report = data.report[split]
    parts = {part: context_measures(report, part) for part in filtered_parts(report)}
    if not parts:
        return []
    table = Table(title="What the context filter left")
    table.add_column("of the contexts")
    for part in parts:
        table.add_column(part or type(data.filter).__name__, justify="right")
    for name, label in MEASURES.items():
        values = [measures.get(name) for measures in parts.values()]
        if all(value is None for value in values):
            continue
        shown = ("-" if value is None else f"{value:.0f}" if "tokens" in name else f"{value:.3f}" for value in values)
        table.add_row(label, *shown)
    return [table]
