"""A file for each context filter that reads one: the arguments that name it, by class."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoders import saved

from lrsa_lit.data.summary_file import line_of

SUMMARISED = "The Isk is a river of the north. It is 212 kilometres long."
"""A passage that the file of summaries has."""


def _cpc(folder: Path) -> dict[str, Any]:
    return {"checkpoint": saved(folder / "encoder.ckpt")}


def _summaries(folder: Path) -> dict[str, Any]:
    path = folder / "summaries.jsonl"
    path.write_text(json.dumps(line_of(SUMMARISED, "x", "Isk: 212 kilometres.")) + "\n")
    return {"map": str(path)}


FILTER_FILES: dict[str, Callable[[Path], dict[str, Any]]] = {"CPC": _cpc, "Summaries": _summaries}
"""They write into the folder that they are given."""
