"""A report of a study's results, and the generated blocks of documents."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.report import markdown
from lrsa_lit.experiments.report.blocks import Blocks
from lrsa_lit.experiments.report.markers import filled, replace
from lrsa_lit.study.plan import Study
from lrsa_lit.study.results import Line, read_lines

_WHOLE = {"bars": "What was to be reached", "perplexity": "Perplexity", "survival": "Supporting tokens kept",
          "training": "Training", "machines": "Machines"}  # fmt: skip


def results_of(study: Study, path: Path) -> list[Line]:
    """The results of a file, by the names that the study's rows have now; those of rows that it has no more stay out.

    Raises:
        UserError: there is no such file, or there are none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; `lrsa study run` writes it")
    names = {row.hash: row.name for row in reversed(study.rows.values())}
    lines = [{**line, "row": names[line["config"]]} for line in read_lines(path) if line["config"] in names]
    if not lines:
        raise UserError(f"{path}: it holds no results of the rows of {study.name}")
    return lines


def write_report(study: Study, lines: Sequence[Line], folder: Path) -> None:
    """Write ``report.md`` with everything that there is, and its plots.

    Args:
        study: the study, for its parts and their order.
        lines: the results.
        folder: where the report goes.
    """
    blocks = Blocks(study, lines)
    texts = [f"# Results of {Path(study.name).stem}", "", markdown.LEGEND]
    for name, title in _titles(study, blocks):
        text = blocks.text(name)
        if not text:
            continue
        texts += ["", f"## {title}", "", text]
        plot = f"{name}/plot"
        figure = blocks.figure(plot) if "/" in name or plot in ("perplexity/plot", "survival/plot") else None
        if figure is not None:
            texts += ["", f"![{blocks.caption(plot)}]({_file(plot)})"]
            replace(folder / _file(plot), _png(figure))
    replace(folder / "report.md", ("\n".join(texts) + "\n").encode())
    print(f"{folder / 'report.md'}", flush=True)


def _titles(study: Study, blocks: Blocks) -> list[tuple[str, str]]:
    parts = [(f"{part}/{data_set}", f"{part}: {data_set} ({blocks.table(part, data_set).split})")
             for part in study.parts for data_set in study.parts[part]["sets"]]  # fmt: skip
    whole = list(_WHOLE.items())
    return [whole[0], *parts, *whole[1:]]


def fill(study: Study, lines: Sequence[Line], files: Sequence[Path], plots: Path, data: Path | None = None) -> None:
    """Write the blocks of Markdown files anew; nothing is written if one of the files cannot be filled.

    Args:
        study: the study.
        lines: the results.
        files: the files, as :mod:`lrsa_lit.experiments.report.markers` describes them.
        plots: folder for the plots that they show.
        data: folder of the study's token files, for the blocks that look at the questions.

    Raises:
        UserError: a file has no blocks, or one that there is not or that needs the data.
    """
    blocks = Blocks(study, lines, data)
    images: dict[Path, bytes] = {}

    def text_of(name: str, document: Path) -> str:
        if not name.endswith("/plot"):
            return blocks.text(name)
        figure = blocks.figure(name)
        if figure is None:
            return ""
        image = plots / _file(name)
        images[image] = _png(figure)
        link = Path(os.path.relpath(image, document.parent)).as_posix()
        return f"![{blocks.caption(name)}]({link})"

    contents = {path: filled(path, lambda name, path=path: text_of(name, path)) for path in files}  # type: ignore[misc]
    for path, content in (images | contents).items():
        if not path.exists() or path.read_bytes() != content:
            replace(path, content)
    print(", ".join(map(str, contents)), flush=True)


def _file(name: str) -> str:
    return f"{name.removesuffix('/plot').replace('/', '-')}.png"


def _png(figure: Figure) -> bytes:
    """Of few colours, which makes files small, and without a time or version: the same results give the same file."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    Image.open(drawn).convert("RGB").quantize(64).save(packed, format="png", optimize=True)
    return packed.getvalue()
