"""Data sets for question answering over long contexts; each is loaded when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrsa_lit.data.hotpotqa import HotpotQA
    from lrsa_lit.data.longbench import LongBench
    from lrsa_lit.data.mixture import Mixture
    from lrsa_lit.data.module import QADataModule
    from lrsa_lit.data.needle import Needles
    from lrsa_lit.data.qa_files import QAFiles
    from lrsa_lit.data.ruler import Ruler
    from lrsa_lit.data.squad import SquadArticles

__all__ = [
    "HotpotQA",
    "LongBench",
    "Mixture",
    "Needles",
    "QADataModule",
    "QAFiles",
    "Ruler",
    "SquadArticles",
]

_MODULES = {
    "HotpotQA": "hotpotqa",
    "LongBench": "longbench",
    "Mixture": "mixture",
    "Needles": "needle",
    "QADataModule": "module",
    "QAFiles": "files",
    "Ruler": "ruler",
    "SquadArticles": "squad",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
