"""The report of a study's results, and generated blocks in Markdown documents.

A block is enclosed by the lines ``<!-- study:NAME -->`` and ``<!-- /study -->`` in a handwritten document. Everything
outside of blocks is kept byte for byte. Documents about several studies name the study of each block:
``<!-- study:STUDY:NAME -->``.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from matplotlib.figure import Figure
from PIL import Image

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import at_budgets, evidence, result_plots, tables
from lrsa_lit.experiments.report.bars import Bars, claim_of, table_of
from lrsa_lit.experiments.report.cells import Cells, Table
from lrsa_lit.experiments.report.named_plots import named_plot
from lrsa_lit.experiments.report.places import by_place
from lrsa_lit.experiments.results import Line, read_lines
from lrsa_lit.experiments.study import Study
from lrsa_lit.io import write_atomically

_MARK = re.compile(rb"^<!-- (?:study:(\S+)|/study) -->[^\S\n]*(?:\n|\Z)", re.MULTILINE)

_FORMS = "PART, PART/SET, PART/SET/plot, PART/SET/places, PART/SET/budgets, PART/SET/budgets/plot"
"""Blocks of a part: its matrices; and for one data set the full table, the plot, scores by answer position, and tables
and plot of a comparison at budgets."""

_TITLES = {"perplexity": "Perplexity", "survival": "Supporting tokens kept", "training": "Training",
           "machines": "Machines"}  # fmt: skip


class Blocks:
    """Texts and plots of a study's results, by name; some texts read the questions from the study's data folder.

    Attributes:
        texts: functions that write the Markdown of a block; empty without results.
        plots: the caption of each plot, and the function that draws it; it returns None without results.
        tables: the table of each ``PART/SET``.
        images: contents of the plots that were requested, by file.
    """

    def __init__(self, study: Study, lines: Sequence[Line], data: Path | None = None) -> None:
        self.study, cells = study, Cells(study, lines)
        self._bars, self.images = Bars(cells), dict[Path, bytes]()
        self.texts: dict[str, Callable[[], str]] = {
            "summary": self._summary,
            "legend": lambda: tables.LEGEND,
            "bars": self._verdicts,
            "claim": lambda: claim_of(self._bars.verdicts()).markdown(),
            "parts": self._parts,
            "perplexity": lambda: evidence.perplexity(cells).markdown(),
            "survival": lambda: evidence.survival(cells).markdown(),
            "training": lambda: tables.training(cells.lines).markdown(),
            "machines": lambda: tables.machines(lines).markdown(),
            "budgets-legend": lambda: at_budgets.LEGEND if cells.lines else "",
        }
        self.plots: dict[str, tuple[str, Callable[[], Figure | None]]] = {
            "perplexity/plot": ("perplexity against the share of pairs kept",
                                lambda: result_plots.perplexity(evidence.texts(cells))),
            "survival/plot": ("supporting tokens kept, before and after training",
                              lambda: result_plots.survival(evidence.pairs(cells))),
        }  # fmt: skip
        for name, plot in study.plots.items():
            self.plots[f"{name}/plot"] = plot["title"], partial(named_plot, cells, name)
        self._whole = [*self.texts, *self.plots]
        self.tables = {f"{part}/{name}": Table(cells, part, name) for part in study.parts
                       for name in study.parts[part]["sets"]}  # fmt: skip
        for name, table in self.tables.items():
            # Its intervals take time, and both blocks need it.
            section = functools.cache(partial(at_budgets.section_of, table.data_set, [table]))
            self.texts |= {name: partial(_full, table), f"{name}/places": partial(_places, table, data),
                           f"{name}/budgets": partial(_at_budgets, table, section)}  # fmt: skip
            against = partial(_against_cache, table, section)
            self.plots[f"{name}/budgets/plot"] = f"{name}: quality against cache bytes", against
            self.plots[f"{name}/plot"] = f"{name}: {self._about(table)}", partial(self._plot, table)
        self.texts = {part: partial(self._matrices, part) for part in study.parts} | self.texts

    def check(self, name: str) -> None:
        """Raise a UserError if there is no block of this name."""
        if name not in self.texts and name not in self.plots:
            allowed, parts = ", ".join([*self._whole, _FORMS]), ", ".join(self.study.parts)
            raise UserError(f"there is no block {name!r}", reason=f"blocks are {allowed} with PART one of {parts}")

    def markdown(self, name: str, document: Path, folder: Path, prefix: str = "") -> str:
        """The Markdown of a block in ``document``; empty without results.

        A plot becomes a link to a file in ``folder``, named by ``prefix`` and the block.
        """
        if name in self.texts:
            return self.texts[name]()
        caption, draw = self.plots[name]
        if (figure := draw()) is None:
            return ""
        # Few colours keep files small. Without time and version in it, equal results give an identical file.
        drawn, packed = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=120)
        Image.open(drawn).convert("RGB").quantize(64).save(packed, format="png", optimize=True)
        path = folder / f"{prefix}{name.removesuffix('/plot').replace('/', '-')}.png"
        self.images[path] = packed.getvalue()
        return f"![{caption}]({Path(os.path.relpath(path, document.parent)).as_posix()})"

    def _verdicts(self) -> str:
        verdicts = self._bars.verdicts()
        return table_of(verdicts).markdown() if any(item.verdict != "open" for item in verdicts) else ""

    def _summary(self) -> str:
        text = self._bars.summary().markdown()
        return f"{text}\n\n{tables.SHARES}" if text else ""

    def _matrices(self, part: str) -> str:
        return "\n\n".join(
            f"**{table.data_set} ({table.split}), {tables.LABELS[table.measure]}**\n\n"
            f"{_counted(table)}{tables.matrix(table).markdown()}"
            for table in self.tables.values()
            if table.part == part and table.cells
        )

    def _parts(self) -> str:
        """All tables by part, each with a heading."""
        titles = [(f"{table.part}: {table.data_set} ({table.split})", table) for table in self.tables.values()]
        return "\n\n".join(f"### {title}\n\n{_full(table)}" for title, table in titles if table.cells)

    def _about(self, table: Table) -> str:
        if table.measure != "loss":
            return "the score against the share of pairs attended to"
        return "what each dense layer recovers" if self.study.generates(table.data_set) else "perplexity"

    def _plot(self, table: Table) -> Figure | None:
        title = f"{table.part}: {table.data_set}"
        if table.measure != "loss":
            return result_plots.against_share(table.entries, table.measure, title) if table.cells else None
        # The perplexities of all parts are in one separate plot.
        return result_plots.layers(evidence.layers(table), title) if self.study.generates(table.data_set) else None


def results_of(study: Study, path: Path, *, may_be_empty: bool = False) -> list[Line]:
    """The results of a file, with the current names of the study's rows; results of removed rows are left out.

    Raises:
        UserError: there is no file, or no result is left. With ``may_be_empty``, an empty file is allowed.
    """
    if not path.exists():
        raise UserError(str(path), reason="no such file; `lrsa study run` writes it")
    names = {row.hash: row.name for row in reversed(study.rows.values())}
    lines = [{**line, "row": names[line["config"]]} for line in read_lines(path) if line["config"] in names]
    if not lines and not (may_be_empty and path.stat().st_size == 0):
        raise UserError(str(path), reason=f"it holds no results of the rows of {study.name}")
    return lines


def write_report(study: Study, lines: Sequence[Line], folder: Path) -> None:
    """Write ``report.md`` with all results, by part of the study, and its plots into a folder."""
    blocks, report = Blocks(study, lines), folder / "report.md"
    parts = {name: f"{table.part}: {table.data_set} ({table.split})" for name, table in blocks.tables.items()}
    texts = [f"# Results of {study.title}", "", tables.LEGEND]
    for name, title in ({"bars": "Targets"} | parts | _TITLES).items():
        if text := blocks.markdown(name, report, folder):
            texts += ["", f"## {title}", "", text]
            plot = f"{name}/plot"
            if plot in blocks.plots and (shown := blocks.markdown(plot, report, folder)):
                texts += ["", shown]
    _write(blocks.images | {report: ("\n".join(texts) + "\n").encode()})
    print(report, flush=True)


def fill(study: Study, lines: Sequence[Line], files: Sequence[Path], folder: Path, data: Path | None = None) -> None:
    """Like :func:`fill_all`, for one study."""
    fill_all([Blocks(study, lines, data)], files, folder)


def fill_all(studies: Sequence[Blocks], files: Sequence[Path], folder: Path) -> None:
    """Update the blocks of Markdown files, and write their plots into a folder.

    Raises:
        UserError: a block is unknown or malformed, or a file cannot be read or written.
    """

    def text_of(name: str, document: Path) -> str:
        blocks, own, prefix = _block_of(studies, name)
        return blocks.markdown(own, document, folder, prefix)

    documents = {path: filled(path, partial(text_of, document=path)) for path in files}
    _write({path: image for blocks in studies for path, image in blocks.images.items()} | documents)
    print(", ".join(map(str, documents)), flush=True)


def _block_of(studies: Sequence[Blocks], name: str) -> tuple[Blocks, str, str]:
    """Resolve a block's mark: the study's blocks, the block's name among them, and the prefix of its plot files.

    Raises:
        UserError: there is no such block.
    """
    title, _, own = name.rpartition(":")
    titles = {blocks.study.title: blocks for blocks in studies}
    if len(studies) == 1 and title in ("", *titles):
        blocks = studies[0]
    elif title in titles:
        blocks = titles[title]
    else:
        named = " or ".join(f"{title}:NAME" for title in titles)
        raise UserError(f"there is no block {name!r}", reason=f"with several studies, name it {named}")
    blocks.check(own)
    return blocks, own, f"{title}-" if title else ""


def filled(path: Path, text_of: Callable[[str], str]) -> bytes:
    """The content of a file with the text of each block replaced by ``text_of(NAME)``.

    Raises:
        UserError: the file has no block, a block is not opened or closed, or ``text_of`` fails; it names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(str(path), reason=f"it cannot be read ({error.strerror})") from None
    marks = list(_MARK.finditer(content))
    if not marks:
        reason = "it has no block; one is a line <!-- study:NAME --> and a line <!-- /study -->"
        raise UserError(str(path), reason=reason)
    parts, kept_from = [], 0
    for opening, closing in itertools.zip_longest(marks[::2], marks[1::2]):
        number = content.count(b"\n", 0, opening.start()) + 1
        where = f"{path}, line {number}"
        if not opening[1]:
            raise UserError(where, reason="<!-- /study --> closes nothing; each block has exactly one")
        name = opening[1].decode()
        if closing is None or closing[1]:
            raise UserError(where, reason=f"the block {name!r} is not closed by a line <!-- /study -->")
        try:
            text = text_of(name).encode()
        except UserError as error:
            raise UserError(where, reason=str(error)) from None
        if _MARK.search(text):
            raise UserError(where, reason=f"the text of the block {name!r} contains the mark of a block")
        # A blank line is needed: Markdown would treat a table right after a comment as part of the comment.
        parts += [content[kept_from : opening.end()], b"\n" + text + b"\n\n" if text else b""]
        kept_from = closing.start()
    return b"".join([*parts, content[kept_from:]])


def replace(path: Path, content: bytes) -> None:
    """Replace the content of a file atomically; an existing file keeps its permissions.

    Raises:
        UserError: the file cannot be written.
    """

    def write(file: IO[bytes]) -> None:
        if path.exists():
            Path(file.name).chmod(path.stat().st_mode)
        file.write(content)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise UserError(str(path), reason=f"it cannot be written ({error.strerror})") from None


def _write(contents: dict[Path, bytes]) -> None:
    """Write the files whose contents change."""
    for path, content in contents.items():
        if not path.exists() or path.read_bytes() != content:
            replace(path, content)


def _full(table: Table) -> str:
    return _counted(table) + tables.full(table).markdown() if table.cells else ""


def _at_budgets(table: Table, section: Callable[[], at_budgets.Section]) -> str:
    return _counted(table) + section().markdown() if table.cells else ""


def _against_cache(table: Table, section: Callable[[], at_budgets.Section]) -> Figure | None:
    return section().figure if table.cells else None


def _places(table: Table, data: Path | None) -> str:
    return by_place(table, data).markdown() if table.cells else ""


def _counted(table: Table) -> str:
    """A note on how many results of a part exist, if some are missing."""
    return f"{table.done} of {table.asked} results are in.\n\n" if table.done < table.asked else ""
