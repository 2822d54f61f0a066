"""The report of a comparison: tables of quality and cost, and plots of quality against cache bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

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
All numbers are measured. Shares are relative to dense attention on the unfiltered prompt. *kept*: K/L of the rule, with
1 for dense layers; for a system, the pairs that it holds; for a filter, the tokens that it leaves. *cache*: bytes held
at the end of the prompt, including sinks, windows, dense layers and waiting queries; memory that is allocated for later
tokens does not count. *peak*: the most bytes held during prefill. *pairs*: query-key pairs attended to in the prompt.
*read*: bytes that one token of the answer reads. Times are medians over batches; they depend on the batch size and the
machine, and do not include filters. Budgets hold for a prompt of max_tokens tokens.
Systems that compress a prompt once do so after the context, before they see the question; they then hold the whole
question within the budget. Systems marked *[q]* compress after the question, so the question can decide what they
keep."""
_OF_PRODUCTS = f"""
Filters shorten each whole prompt to the budget. LoRC gives keys and values a low rank; the cache holds their latents
and positions. The shares of a product multiply: *to 50%* is a fixed share, and the other factor gets the rest of the
budget. *reusable*: whether the cache can serve another question about the same context. {" and ".join(CONTROLS)} are
baselines with dense attention at the same budget: the first cuts out the middle, the second keeps random sentences."""


class _Shown(NamedTuple):
    """A row of a table."""

    name: str
    budget: float | None
    cell: Cell
    reusable: bool


class Section(NamedTuple):
    """The results of a data set.

    Attributes:
        title: heading of the section.
        at_budgets: dense attention, and everything with a budget or a filter.
        holding: systems that keep the whole cache.
        figure: plot of quality against cache bytes.
    """

    title: str
    at_budgets: Grid
    holding: Grid
    figure: Figure

    def markdown(self) -> str:
        """Both tables, the second with a sentence that introduces it."""
        tables = [self.at_budgets.markdown()]
        if holding := self.holding.markdown():
            tables += ["These systems hold the whole cache, and read or attend to less of it:", holding]
        return "\n\n".join(tables)


def write(study: Study, lines: Sequence[Line], folder: Path) -> list[Section]:
    """Write ``README.md`` and a plot for each data set into a folder, and return the tables.

    Data sets without results are left out.
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
        sections.append(section := section_of(data_set, found))
        section.figure.savefig(folder / f"{data_set}.png", dpi=120)
        texts += ["", f"## {section.title}", "", f"![]({data_set}.png)", "", section.markdown()]
    write_atomically(folder / "README.md", lambda file: file.write(("\n".join(texts) + "\n").encode()))
    return sections


def section_of(data_set: str, tables: Sequence[Table]) -> Section:
    """The results of a data set; ``tables`` are those of the parts that ask its questions, with or without a filter."""
    study = tables[0].study
    places = {attention: place for place, attention in enumerate(study.inference)}
    shown: list[_Shown] = []
    others: list[_Shown] = []
    for table in tables:
        place = place_of(table.part, [cell.attention for cell in table.cells])
        # A part may name first what is to be evaluated first.
        for cell in sorted(table.cells, key=lambda cell: places.get(cell.attention, -1)):
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
    reuse = len(tables) > 1
    at_budgets, holding = _grid(measure, shown, dense, reuse), _grid(measure, others, dense, reuse, "read")
    return Section(title, at_budgets, holding, figure)


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
            milliseconds("first_token_seconds", "first token (ms)"),
            milliseconds("token_seconds", "later tokens (ms)"),
        ],
        names=1,
    )


def _on_questions_of(cell: Cell, dense: Cell) -> Cell:
    """Dense attention's cell with the filtered data set's digest, so that both can be compared.

    A filter changes the prompts and so the digest; the cell stays unchanged unless the questions are the same.
    """
    asked = dense.line.get("ids_digest")
    if asked is None or asked != cell.line.get("ids_digest"):
        return dense
    return replace(dense, lines=tuple({**line, "set_digest": cell.line["set_digest"]} for line in dense.lines))


def _is_reusable(study: Study, table: Table, cell: Cell) -> bool:
    """Whether the cache of a cell is independent of the question, so that it can serve other questions."""
    shortens = study.data_set(table.data_set)["init_args"].get("filter")
    if shortens and plugins.find("filters", shortens["class_path"], "filter").asks:  # type: ignore[attr-defined]
        return False
    system = (cell.line["rule"] or {}).get("system")
    return not (system and system["init_args"].get("question"))


def _taken(cell: Cell, key: str) -> float | None:
    measured = cell.line.get("measured") or {}
    found: float | None = measured.get(key, measured.get("cache") if key == "read" else None)
    return found
