"""Your own plain texts, for continued training on every token and for perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from lrsa_lit.data.module import Score, Split
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.reading import SUFFIXES, blamed_on, check_text, kind_of, read_rows, read_text
from lrsa_lit.data.split_files import SplitFiles
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError

_PLAIN = ".txt"


@dataclass(frozen=True)
class Piece:
    """A piece of a text.

    Attributes:
        id: id of the text, and the number of the piece.
        ids: token ids.
        context: number of tokens at the start without a loss.
        task: always "".
    """

    id: str
    ids: tuple[int, ...]
    context: int
    task: str = ""

    def check_texts(self) -> None:
        """Do nothing: tokens hold no half characters."""


class TextFiles(SplitFiles):
    """Plain texts, cut into pieces of ``max_tokens``: rows with a field ``text``, or whole .txt files.

    No chat template is used. A piece starts with the tokens that the tokenizer puts before every text (such as a
    begin-of-text token), followed by the last token of the previous piece. Each token except a text's first is
    therefore predicted exactly once. The last piece of a text is shorter; packing fills sequences with whole pieces,
    which do not attend to each other. No token is added at the end of a text.

    Args:
        scored_from: number of tokens at the start of each piece that are only context in validation and test. Shorter
            pieces are left out and counted as ``too_short``. Training learns all tokens.
        kwargs: see SplitFiles and QADataModule; files are .jsonl, .json, .parquet or .txt. Rows may have other fields.
    """

    suffixes: ClassVar[tuple[str, ...]] = (*SUFFIXES, _PLAIN)
    noun: ClassVar[str] = "piece"
    score: ClassVar[Score] = "loss"

    def __init__(self, scored_from: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= scored_from < self.max_tokens:
            raise UserError("scored_from", scored_from, f"an integer from 0 to max_tokens - 1 ({self.max_tokens - 1})")
        self.scored_from = scored_from

    def records(self, split: Split) -> Iterator[Piece]:
        """The pieces of a split's texts, in order."""
        before = self._before()
        room = self.max_tokens - len(before) - 1
        if room < 1:
            raise UserError("max_tokens", self.max_tokens, f"{len(before) + 2} or more")
        for number, (place, text) in enumerate(self._texts(split), start=1):
            with blamed_on(place):
                ids = encode_text(self.checked_tokenizer, text).ids
            for part, start in enumerate(range(0, max(len(ids) - 1, 1), room), start=1):
                piece = (*before, *ids[start : start + room + 1])
                # The repeated token at the start of a piece was predicted in the previous piece.
                known = len(before) + (1 if start or not before else 0)
                context = known if split == "train" else max(known, self.scored_from)
                if context >= len(piece):
                    self.report[split]["too_short"] += 1
                    continue
                yield Piece(f"{split}-{number}-{part}", piece, context)

    def to_example(self, record: Piece) -> Example | TooLong:
        """The example of a piece, which is already tokenised."""
        return Example(
            id=record.id,
            input_ids=list(record.ids),
            prompt_length=record.context,
            context_span=(0, len(record.ids)),
            gold_spans=[],
            answer_spans=[],
            answers=[],
            match="any",
        )

    def _before(self) -> list[int]:
        """The tokens that the tokenizer puts before every text."""
        found = self.checked_tokenizer("x", return_special_tokens_mask=True)
        return list(found["input_ids"][: found["special_tokens_mask"].index(0)])

    def _texts(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield each text of a split with its place."""
        for path in self.files(split):
            for place, row in [(str(path), read_text(path))] if path.suffix == _PLAIN else read_rows(path):
                with blamed_on(place):
                    text = _text_of(row)
                yield place, text


def _text_of(row: object) -> str:
    """The text of a row or file; raises a UserError if there is none."""
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        missing = isinstance(row, dict) and "text" not in row
        raise UserError("text", reason="is missing" if missing else f"is {kind_of(text)}", allowed="a string")
    if not text.strip():
        raise UserError("text", reason="is empty", allowed="a non-empty text")
    check_text(text, "text")
    return text
