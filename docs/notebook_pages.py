"""A notebook as a page of the site: its text, its code, and the outputs that it stores, in Markdown."""

import base64
import re
from pathlib import Path

import nbformat

# pandas brings a style of its own; without it, tables look like those of other pages.
_OWN_STYLE = re.compile(r"<style scoped>.*?</style>\s*|(?<=<table) border=\"1\" class=\"dataframe\"", re.DOTALL)

# Cells that would be too wide on one line.
_LONG, _WRAPPED = re.compile(r"<(td|th)>(?=[^<]{40})"), r'<\1 class="long">'


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures (PNG) by the file names that the Markdown links to."""
    texts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            texts.append(cell.source)
            heading = next((line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")), heading)
            continue
        texts.append(_fenced(cell.source, "python"))
        for output in cell.outputs:
            shown = output.get("data", {})
            if "image/png" in shown:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(shown["image/png"])
                # Pictures have two pixels for each of the page's.
                width = output.metadata.get("image/png", {}).get("width", 700)
                texts.append(f'![{heading}]({name}){{ width="{width}" }}')
            elif "text/html" in shown:
                text = _OWN_STYLE.sub("", shown["text/html"]).replace("<td>NaN</td>", "<td></td>")
                texts.append(f'<div class="frame">\n{_LONG.sub(_WRAPPED, text)}\n</div>')
            else:
                texts.append(_fenced(output.text if output.output_type == "stream" else shown["text/plain"], "text"))
    return "\n\n".join(texts) + "\n", pictures


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
