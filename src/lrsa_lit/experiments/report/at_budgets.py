"""The report of a comparison: tables of quality beside what each system takes, and quality against cache bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lrsa_lit import plugins
from lrsa_lit.experiments.comparison import place_of
from lrsa_lit.experiments.product_names import CONTROLS
from lrsa_lit.experiments.report import columns, result_plots
from lrsa_lit.experiments.report.cells import Cell, Cells, Table
from lrsa_lit.experiments.report.columns import Column, Grid
from lrsa_lit.experiments.report.tables import LABELS
from lrsa_lit.experiments.results import Line
from lrsa_lit.experiments.study import DENSE, Study
from lrsa_lit.io import write_atomically

LEGEND = """\
All numbers are measured, and shares are of what dense attention takes of the prompt, of the one before a filter
shortened it. *kept*: K/L of the rule, with dense layers whole; of a system the pairs that it holds, of a filter the
tokens that it leaves. *cache*: bytes held at the end of the prompt as a share of what a dense cache holds of it, sinks,
windows, dense layers and waiting queries among them; memory that is made for later tokens does not count. *peak*: the
most that was held in prefill. *pairs*: attended query-key pairs of the prompt. *read*: bytes that a token of the answer
reads. Seconds are medians over batches, and depend on their size and on the machine; those of a filter are not among
them. A budget is met for a prompt of max_tokens tokens.
Systems that cut a prompt once do so behind the context, before they see the question, which they then hold in full
within the budget; those marked *[q]* cut behind the question, which can decide what they keep."""
_OF_PRODUCTS = f"""
Filters shorten each prompt to the budget, what stands around the context counted. LoRC makes keys and values of a low
rank, and the cache holds their latents and positions. Shares of a product multiply; *to 50%* is fixed, the other factor
takes what is left of the budget. *reusable*: whether what is held serves another question about the same context.
{" and ".join(CONTROLS)} are the controls: a cut in the middle, and sentences at random, with dense attention at the
same budget."""


class _Shown(NamedTuple):
    """A row of a table."""

    name: str
    budget: float | None
    cell: Cell
    reusable: bool


class Section(NamedTuple):
    """A data set's results.

    Attributes:
        at_budgets: dense attention, and what was set to budgets.
        holding: what holds everything.
        figure: quality against the bytes of the cache, a file beside the report.
    """

    title: str
    at_budgets: Grid
    holding: Grid
    figure: Path


def write(study: Study, lines: Sequence[Line], folder: Path) -> list[Section]:
    """Write ``README.md`` and a plot of each data set into a folder; returns the tables.

    A data set that has no results yet is left out.
    """
    cells = Cells(study, lines)
    tables: dict[str, list[Table]] = {}
    for part, asked in study.parts.items():
        (data_set,) = asked["sets"]
        tables.setdefault(place_of(part, ()).data_set, []).append(Table(cells, part, data_set))
    legend = LEGEND + (_OF_PRODUCTS if len(study.parts) > len(tables) else "")
    sections, texts = [], [f"# {study.title}", "", legend]
    for data_set, found in tables.items():
        if not any(table.cells for table in found):
            continue
        section = _section(study, data_set, found, folder)
        sections.append(section)
        texts += ["", f"## {section.title}", "", section.at_budgets.markdown(), "", f"![]({section.figure.name})"]
        if holding := section.holding.markdown():
            texts += ["", "These hold everything, and read or attend to less:", "", holding]
    write_atomically(folder / "README.md", lambda file: file.write(("\n".join(texts) + "\n").encode()))
    return sections


def _section(study: Study, data_set: str, tables: Sequence[Table], folder: Path) -> Section:
    shown: list[_Shown] = []
    others: list[_Shown] = []
    for table in tables:
        place = place_of(table.part, [cell.attention for cell in table.cells])
        for cell in table.cells:
            name, budget = place.attentions[cell.attention]
            has_filter = "filter" in study.data_set(table.data_set)["init_args"]
            holds_less = cell.attention == DENSE or budget is not None or has_filter
            (shown if holds_less else others).append(_Shown(name, budget, cell, _is_reusable(study, table, cell)))
    measure = tables[0].measure
    dense = next((each.cell for each in shown if each.name == DENSE), None)
    about = (dense or (shown or others)[0].cell).line
    title = f"{data_set}: {LABELS[measure]}, {about['questions']} questions, {about['row']}"
    figure = result_plots.against_cache(
        [(each.name, _taken(each.cell, "cache") or 0.0, each.cell.estimate(measure)) for each in shown],
        LABELS[measure], title)  # fmt: skip
    path = folder / f"{data_set}.png"
    figure.savefig(path, dpi=120)
    reuse = len(tables) > 1
    at_budgets, holding = _grid(measure, shown, dense, reuse), _grid(measure, others, dense, reuse, "read")
    return Section(title, at_budgets, holding, path)


def _grid(measure: str, rows: Sequence[_Shown], dense: Cell | None, reuse: bool, *more: str) -> Grid:
    cells = [row.cell for row in rows]
    compared = [cell.compared(dense and _on_questions_of(cell, dense), measure) for cell in cells]

    def taken(key: str, title: str = "") -> Column:
        return Column(title or key, [_taken(cell, key) for cell in cells], columns.share)

    def milliseconds(key: str, title: str) -> Column:
        return Column(title, [_taken(cell, key) for cell in cells], lambda value: f"{1000 * value:.1f}")

    return Grid(
        [
            Column("system", [row.name for row in rows]),
            Column("budget", [row.budget for row in rows], columns.share),
            Column(LABELS[measure], [cell.estimate(measure) for cell in cells], columns.interval),
            Column("minus dense", [item and item.difference for item in compared], columns.signed),
            *(taken(key) for key in (*more, "kept", "cache", "peak", "pairs")),
            *([Column("reusable", ["yes" if row.reusable else "no" for row in rows])] if reuse else []),
            milliseconds("first_token_seconds", "first token, ms"),
            milliseconds("token_seconds", "token, ms"),
        ],
        names=1,
    )


def _on_questions_of(cell: Cell, dense: Cell) -> Cell:
    """Dense attention as if on a filtered data set, whose prompts are others, where the questions are the same."""
    asked = dense.line.get("ids_digest")
    if asked is None or asked != cell.line.get("ids_digest"):
        return dense
    return replace(dense, lines=tuple({**line, "set_digest": cell.line["set_digest"]} for line in dense.lines))


def _is_reusable(study: Study, table: Table, cell: Cell) -> bool:
    """Whether what a cell holds of a context does not depend on the question."""
    shortens = study.data_set(table.data_set)["init_args"].get("filter")
    if shortens and plugins.find("filters", shortens["class_path"], "filter").asks:  # type: ignore[attr-defined]
        return False
    system = (cell.line["rule"] or {}).get("system")
    return not (system and system["init_args"].get("question"))


def _taken(cell: Cell, key: str) -> float | None:
    measured = cell.line.get("measured") or {}
    found: float | None = measured.get(key, measured.get("cache") if key == "read" else None)
    return found
