"""Data sets for question answering over long contexts; each is loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

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

__getattr__ = lazily(
    __name__,
    {
        "HotpotQA": "lrsa_lit.data.hotpotqa",
        "LongBench": "lrsa_lit.data.longbench",
        "Mixture": "lrsa_lit.data.mixture",
        "Needles": "lrsa_lit.data.needle",
        "QADataModule": "lrsa_lit.data.module",
        "QAFiles": "lrsa_lit.data.qa_files",
        "Ruler": "lrsa_lit.data.ruler",
        "SquadArticles": "lrsa_lit.data.squad",
    },
)
