"""Your own chats and instructions with answers, for training on the assistant's messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lrsa_lit.data.chats import ASSISTANT, Chat, Message, chat_of, encode_chat
from lrsa_lit.data.module import Split
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.reading import blamed_on, check_row, kind_of
from lrsa_lit.data.split_files import SplitFiles
from lrsa_lit.errors import UserError


class ChatFiles(SplitFiles):
    """Chats in OpenAI's format for fine-tuning: ``{"messages": [{"role": …, "content": …}, …]}``.

    The loss covers all of the assistant's messages, including the token that ends each. Chats longer than
    ``max_tokens`` are left out and counted. Evaluation generates the last message.

    Args:
        kwargs: see SplitFiles and QADataModule; files are .jsonl, .json or .parquet.
    """

    noun: ClassVar[str] = "chat"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def records(self, split: Split) -> Iterator[Chat]:
        """The chats of a split in the order of its files; a chat without an id is named by split and number."""
        for number, (place, row) in enumerate(self.rows(split), start=1):
            with blamed_on(place):
                if not isinstance(row, dict):
                    raise UserError(self.noun, reason=f"is {kind_of(row)}", allowed="an object")
                chat = self.chat(row, f"{split}-{number}", place)
            yield chat

    def chat(self, row: Mapping[str, Any], default_id: str, place: str) -> Chat:
        """Convert a row to a chat; raise a UserError if it is invalid."""
        return chat_of(row, default_id, place)

    def to_example(self, record: Chat) -> Example | TooLong:
        """Tokenise a chat; errors name its place in the file."""
        tokenizer = self.checked_tokenizer
        with blamed_on(record.place):
            return encode_chat(record, tokenizer, self.max_tokens)


class InstructionFiles(ChatFiles):
    """Instructions in Alpaca's format: ``{"instruction": …, "input": …, "output": …}``; ``input`` is optional.

    Instruction and input, separated by an empty line, become the user's message in the model's chat template. The
    output becomes the assistant's message.

    Args:
        kwargs: see ChatFiles.
    """

    noun: ClassVar[str] = "instruction"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def chat(self, row: Mapping[str, Any], default_id: str, place: str) -> Chat:
        """Convert a row to a chat of two messages."""
        check_row(row, {"instruction": str, "output": str}, {"input": str, "id": str})
        for name in ("instruction", "output"):
            if not row[name].strip():
                raise UserError(name, reason="is empty", allowed="a non-empty text")
        asked = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text and text.strip())
        messages = Message("user", asked), Message(ASSISTANT, row["output"])
        return Chat(row.get("id") or default_id, messages, place)
