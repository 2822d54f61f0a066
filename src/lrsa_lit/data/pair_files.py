"""Pairs of a preferred and a rejected rewriting, to train a model that shortens passages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lrsa_lit.data.chats import ASSISTANT, Chat, Message, encode_chat
from lrsa_lit.data.module import Split
from lrsa_lit.data.preferences import PROMPT, PreferencePair
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.reading import blamed_on, check_text, kind_of
from lrsa_lit.data.split_files import SplitFiles
from lrsa_lit.errors import UserError


@dataclass(frozen=True)
class PairRecord:
    """A pair with its id, and its place in the file for errors."""

    id: str
    pair: PreferencePair
    place: str
    task: str = ""

    def check_texts(self) -> None:
        """Raise a UserError for half a character (a lone surrogate), which no tokenizer accepts."""
        check_text([self.pair.passage, self.pair.chosen, self.pair.rejected], "texts")


class PreferencePairs(SplitFiles):
    """Two rewritings of each passage: ``{"passage": …, "chosen": …, "rejected": …}``.

    The prompt asks for a summary of the passage. The answer is the chosen rewriting; the objective OddsRatio also sees
    the rejected one after the same prompt. Pairs with a rewriting that does not fit into ``max_tokens`` are left out
    and counted.

    Args:
        kwargs: see SplitFiles and QADataModule; files are .jsonl, .json or .parquet. Packing is not supported.
    """

    noun: ClassVar[str] = "pair"
    rejects: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.packing is not None:
            raise UserError("packing", self.packing.tokens, "null, as the token budget does not count rejected answers")

    def records(self, split: Split) -> Iterator[PairRecord]:
        """The pairs of a split in the order of its files, named by split and number."""
        for number, (place, row) in enumerate(self.rows(split), start=1):
            with blamed_on(place):
                if not isinstance(row, dict):
                    raise UserError(self.noun, reason=f"is {kind_of(row)}", allowed="an object")
                pair = PreferencePair.from_dict(row)
            yield PairRecord(f"{split}-{number}", pair, place)

    def to_example(self, record: PairRecord) -> Example | TooLong:
        """Tokenise the prompt with the chosen rewriting, and the rejected rewriting."""
        asked, tokenizer = Message("user", PROMPT.format(passage=record.pair.passage)), self.checked_tokenizer
        chat = Chat(record.id, (asked, Message(ASSISTANT, record.pair.chosen)), record.place)
        other = replace(chat, messages=(asked, Message(ASSISTANT, record.pair.rejected)))
        with blamed_on(record.place):
            chosen, rejected = (encode_chat(each, tokenizer, self.max_tokens) for each in (chat, other))
        if isinstance(chosen, TooLong) or isinstance(rejected, TooLong):
            return TooLong(max(_tokens(chosen), _tokens(rejected)))
        return Example(**chosen, rejected=rejected["input_ids"][rejected["prompt_length"] :])


def _tokens(found: Example | TooLong) -> int:
    return found.tokens if isinstance(found, TooLong) else len(found["input_ids"])
