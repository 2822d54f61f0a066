"""Your own chats, and instructions with their answers, to train on each of the assistant's messages."""

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

    The loss is that of the assistant's messages, all of them, with the token that ends each. A chat longer than
    ``max_tokens`` is left out and counted. To generate answers, the last message is asked for.

    Args:
        kwargs: see SplitFiles and QADataModule; files are .jsonl, .json or .parquet.
    """

    noun: ClassVar[str] = "chat"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def records(self, split: Split) -> Iterator[Chat]:
        """The chats of a split in the order of its files; one without an id is named after split and number."""
        for number, (place, row) in enumerate(self.rows(split), start=1):
            with blamed_on(place):
                if not isinstance(row, dict):
                    raise UserError(self.noun, reason=f"is {kind_of(row)}", allowed="an object")
                chat = self.chat(row, f"{split}-{number}", place)
            yield chat

    def chat(self, row: Mapping[str, Any], default_id: str, place: str) -> Chat:
        """The chat of a row; a UserError says what is wrong with it."""
        return chat_of(row, default_id, place)

    def to_example(self, record: Chat) -> Example | TooLong:
        """The tokens of a chat; an error names its place."""
        tokenizer = self.checked_tokenizer
        with blamed_on(record.place):
            return encode_chat(record, tokenizer, self.max_tokens)


class InstructionFiles(ChatFiles):
    """Instructions as Alpaca has them: ``{"instruction": …, "input": …, "output": …}``, where ``input`` may be missing.

    Instruction and input, with an empty line between them, are the user's message in the model's chat template, and the
    output is the assistant's.

    Args:
        kwargs: see ChatFiles.
    """

    noun: ClassVar[str] = "instruction"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def chat(self, row: Mapping[str, Any], default_id: str, place: str) -> Chat:
        """The chat of two messages that a row makes."""
        check_row(row, {"instruction": str, "output": str}, {"input": str, "id": str})
        for name in ("instruction", "output"):
            if not row[name].strip():
                raise UserError(name, reason="is empty", allowed="a text that is not")
        asked = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text and text.strip())
        messages = Message("user", asked), Message(ASSISTANT, row["output"])
        return Chat(row.get("id") or default_id, messages, place)
