"""Data sets of questions over long contexts, chats and texts; each class is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

if TYPE_CHECKING:
    from lrsa_lit.data.articles import Articles as Articles
    from lrsa_lit.data.chat_files import ChatFiles as ChatFiles
    from lrsa_lit.data.chat_files import InstructionFiles as InstructionFiles
    from lrsa_lit.data.facts_in_text import FactsInText as FactsInText
    from lrsa_lit.data.hotpotqa import HotpotQA as HotpotQA
    from lrsa_lit.data.longbench import LongBench as LongBench
    from lrsa_lit.data.mixture import Mixture as Mixture
    from lrsa_lit.data.module import QADataModule as QADataModule
    from lrsa_lit.data.needle import Needles as Needles
    from lrsa_lit.data.needles_in_turn import NeedlesInTurn as NeedlesInTurn
    from lrsa_lit.data.nth_of_many import NthOfMany as NthOfMany
    from lrsa_lit.data.pair_files import PreferencePairs as PreferencePairs
    from lrsa_lit.data.passkey import Passkey as Passkey
    from lrsa_lit.data.qa_files import QAFiles as QAFiles
    from lrsa_lit.data.ruler import Ruler as Ruler
    from lrsa_lit.data.ruler13 import Ruler13 as Ruler13
    from lrsa_lit.data.squad import SquadArticles as SquadArticles
    from lrsa_lit.data.text_files import TextFiles as TextFiles

_HOMES = {
    "Articles": "articles",
    "ChatFiles": "chat_files",
    "FactsInText": "facts_in_text",
    "HotpotQA": "hotpotqa",
    "InstructionFiles": "chat_files",
    "LongBench": "longbench",
    "Mixture": "mixture",
    "Needles": "needle",
    "NeedlesInTurn": "needles_in_turn",
    "NthOfMany": "nth_of_many",
    "Passkey": "passkey",
    "PreferencePairs": "pair_files",
    "QADataModule": "module",
    "QAFiles": "qa_files",
    "Ruler": "ruler",
    "Ruler13": "ruler13",
    "SquadArticles": "squad",
    "TextFiles": "text_files",
}
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, {name: f"{__name__}.{module}" for name, module in _HOMES.items()})
