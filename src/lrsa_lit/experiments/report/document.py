"""A report of a study's results, and the generated blocks of documents."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import evidence, result_plots, tables
from lrsa_lit.experiments.report.bars import Bars, table_of
from lrsa_lit.experiments.report.cells import Cells, Table
from lrsa_lit.experiments.report.markers import filled, replace
from lrsa_lit.experiments.report.places import by_place
from lrsa_lit.experiments.results import Line, read_lines
from lrsa_lit.experiments.study import Study

_FORMS = "PART, PART/SET, PART/SET/plot, PART/SET/places"
"""Blocks of a part: its matrices, all of one data set, its plot, and its scores by the place of the answer."""

_TITLES = {"perplexity": "Perplexity", "survival": "Supporting tokens kept", "training": "Training",
           "machines": "Machines"}  # fmt: skip


class Blocks:
    """Texts and plots of the results, by name.

    Args:
        study: the study.
        lines: its results.
        data: folder of its data, for the blocks that look at the questions.

    Attributes:
        cells: the results as cells.
        texts: what writes the Markdown of a block, empty where there are no results yet.
        plots: what a plot shows, in words, and what draws it; None where there are no results yet.
    """

    def __init__(self, study: Study, lines: Sequence[Line], data: Path | None = None) -> None:
        self.study, self.data = study, data
        self.cells = cells = Cells(study, lines)
        self.texts: dict[str, Callable[[], str]] = {
            "summary": self._summary,
            "legend": lambda: tables.LEGEND,
            "bars": self._verdicts,
            "perplexity": lambda: evidence.perplexity(cells).markdown(),
            "survival": lambda: evidence.survival(cells).markdown(),
            "training": lambda: tables.training(cells.lines).markdown(),
            "machines": lambda: tables.machines(lines).markdown(),
        }
        self.plots: dict[str, tuple[str, Callable[[], Figure | None]]] = {
            "perplexity/plot": ("perplexity against the share of pairs kept",
                                lambda: result_plots.perplexity(evidence.texts(cells))),
            "survival/plot": ("supporting tokens kept, before and after training",
                              lambda: result_plots.survival(evidence.pairs(cells))),
        }  # fmt: skip
        self._whole = [*self.texts, *self.plots]
        self.tables = {f"{part}/{name}": Table(cells, part, name) for part in study.parts
                       for name in study.parts[part]["sets"]}  # fmt: skip
        for name, table in self.tables.items():
            self.texts |= {name: partial(self._full, table), f"{name}/places": partial(self._places, table)}
            self.plots[f"{name}/plot"] = f"{name}: {self._about(table)}", partial(self._plot, table)
        self.texts = {part: partial(self._matrices, part) for part in study.parts} | self.texts

    @cached_property
    def bars(self) -> Bars:
        """The study's bars."""
        return Bars(self.cells)

    def check(self, name: str) -> None:
        """Refuse a name that no block has."""
        if name not in self.texts and name not in self.plots:
            allowed, parts = ", ".join([*self._whole, _FORMS]), ", ".join(self.study.parts)
            raise UserError(f"there is no block {name!r}", reason=f"there are {allowed} with PART one of {parts}")

    def _verdicts(self) -> str:
        verdicts = self.bars.verdicts()
        return table_of(verdicts).markdown() if any(item.verdict != "open" for item in verdicts) else ""

    def _summary(self) -> str:
        text = self.bars.summary().markdown()
        return f"{text}\n\n{tables.SHARES}" if text else ""

    def _matrices(self, part: str) -> str:
        shown = [table for table in self.tables.values() if table.part == part and table.cells]
        return "\n\n".join(
            f"**{table.data_set} ({table.split}), {tables.LABELS[table.measure]}**\n\n"
            f"{_counted(table)}{tables.matrix(table).markdown()}"
            for table in shown
        )

    def _full(self, table: Table) -> str:
        return _counted(table) + tables.full(table).markdown() if table.cells else ""

    def _places(self, table: Table) -> str:
        return by_place(table, self.data).markdown() if table.cells else ""

    def _about(self, table: Table) -> str:
        if table.measure != "loss":
            return "the score against the share of pairs attended to"
        return "what each dense layer gains" if self.study.generates(table.data_set) else "perplexity"

    def _plot(self, table: Table) -> Figure | None:
        title = f"{table.part}: {table.data_set}"
        if table.measure != "loss":
            return result_plots.against_share(table.entries, table.measure, title) if table.cells else None
        # The texts of all parts stand in one plot of their own.
        return result_plots.layers(evidence.layers(table), title) if self.study.generates(table.data_set) else None


def _counted(table: Table) -> str:
    """How many of the results of a part there are, where some are missing."""
    return f"{table.done} of {table.asked} results are in.\n\n" if table.done < table.asked else ""


def results_of(study: Study, path: Path) -> list[Line]:
    """The results of a file, by the names that the study's rows have now; those of rows that it has no more stay out.

    Raises:
        UserError: there is no such file, or there are none.
    """
    if not path.exists():
        raise UserError(str(path), reason="no such file; `lrsa study run` writes it")
    names = {row.hash: row.name for row in reversed(study.rows.values())}
    lines = [{**line, "row": names[line["config"]]} for line in read_lines(path) if line["config"] in names]
    if not lines:
        raise UserError(str(path), reason=f"it holds no results of the rows of {study.name}")
    return lines


def write_report(study: Study, lines: Sequence[Line], folder: Path) -> None:
    """Write ``report.md`` with everything that there is, and its plots.

    Args:
        study: the study, for its parts and their order.
        lines: the results.
        folder: where the report goes.
    """
    blocks = Blocks(study, lines)
    parts = {name: f"{table.part}: {table.data_set} ({table.split})" for name, table in blocks.tables.items()}
    texts = [f"# Results of {Path(study.name).stem}", "", tables.LEGEND]
    for name, title in ({"bars": "What was to be reached"} | parts | _TITLES).items():
        if not (text := blocks.texts[name]()):
            continue
        texts += ["", f"## {title}", "", text]
        caption, draw = blocks.plots.get(f"{name}/plot", ("", lambda: None))
        if (figure := draw()) is not None:
            texts += ["", f"![{caption}]({_file(name)})"]
            replace(folder / _file(name), _png(figure))
    replace(folder / "report.md", ("\n".join(texts) + "\n").encode())
    print(f"{folder / 'report.md'}", flush=True)


def fill(study: Study, lines: Sequence[Line], files: Sequence[Path], folder: Path, data: Path | None = None) -> None:
    """Write the blocks of Markdown files anew; nothing is written if one of the files cannot be filled.

    Args:
        study: the study.
        lines: the results.
        files: the files, as :mod:`lrsa_lit.experiments.report.markers` describes them.
        folder: for the plots that they show.
        data: folder of the study's data, for the blocks that look at the questions.

    Raises:
        UserError: a file has no blocks, or one that there is not or that needs the data.
    """
    blocks = Blocks(study, lines, data)
    images: dict[Path, bytes] = {}

    def text_of(name: str, document: Path) -> str:
        blocks.check(name)
        if name in blocks.texts:
            return blocks.texts[name]()
        caption, draw = blocks.plots[name]
        if (figure := draw()) is None:
            return ""
        image = folder / _file(name.removesuffix("/plot"))
        images[image] = _png(figure)
        return f"![{caption}]({Path(os.path.relpath(image, document.parent)).as_posix()})"

    contents = {path: filled(path, partial(text_of, document=path)) for path in files}
    for path, content in (images | contents).items():
        if not path.exists() or path.read_bytes() != content:
            replace(path, content)
    print(", ".join(map(str, contents)), flush=True)


def _file(name: str) -> str:
    return f"{name.replace('/', '-')}.png"


def _png(figure: Figure) -> bytes:
    """Of few colours, which makes files small, and without a time or version: the same results give the same file."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    Image.open(drawn).convert("RGB").quantize(64).save(packed, format="png", optimize=True)
    return packed.getvalue()
