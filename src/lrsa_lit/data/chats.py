"""Chats: messages of a user and an assistant, with the loss on all of the assistant's messages.

The model's chat template renders the chat. The loss covers what the model itself would have to write: for each of the
assistant's messages, everything from the end of its prompt up to the special token that ends it. Each prompt is
tokenised separately from its answer, as in generation, so training and generation see the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lrsa_lit.chat_template import render
from lrsa_lit.data.messages import render_messages
from lrsa_lit.data.prompts import Example, TooLong
from lrsa_lit.data.reading import check_row, check_text
from lrsa_lit.data.tokenization import Span, Tokens, encode_text, special_ids
from lrsa_lit.errors import UserError, under

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT, ROLES = "assistant", ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A message of a chat; ``learnt`` says whether a message of the assistant has a loss."""

    role: str
    content: str
    learnt: bool = True


@dataclass(frozen=True)
class Chat:
    """A chat that ends with a message of the assistant.

    Attributes:
        id: unique within a data set.
        messages: in order.
        place: place in the file, for errors.
        task: always "".
    """

    id: str
    messages: tuple[Message, ...]
    place: str = field(default="", compare=False)
    task: str = ""

    def check_texts(self) -> None:
        """Raise a UserError for half a character (a lone surrogate), which no tokenizer accepts."""
        check_text([message.content for message in self.messages], "messages")


def chat_of(row: Mapping[str, Any], default_id: str, place: str) -> Chat:
    """Convert a row in OpenAI's fine-tuning format to a chat.

    Args:
        row: has ``messages``, each with ``role`` and ``content``, and optionally ``id``. A message of the assistant may
            have ``weight``; 0 excludes it from the loss.
        default_id: id of a row without one.
        place: place of the row, for errors.

    Raises:
        UserError: a field is missing, unknown or wrong, a text is empty, or no message has a loss.
    """
    check_row(row, {"messages": [dict]}, {"id": str})
    messages = []
    for number, message in enumerate(row["messages"]):
        with under(f"messages[{number}]"):
            messages.append(_message(message))
    if not any(message.role == ASSISTANT for message in messages):
        raise UserError("messages", reason="has no message of the assistant, so there is nothing to learn")
    if messages[-1].role != ASSISTANT:
        reason = f"ends with a message of the {messages[-1].role}"
        raise UserError("messages", reason=reason, allowed="messages that end with a message of the assistant")
    if not any(message.learnt for message in messages if message.role == ASSISTANT):
        raise UserError(
            "messages", reason="has weight 0 in all messages of the assistant, so there is nothing to learn"
        )
    return Chat(row.get("id") or default_id, tuple(messages), place)


def encode_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example | TooLong:
    """Tokenise a chat of at most ``max_tokens`` tokens; longer chats are not cut.

    The prompt ends where the last answer starts, and the first turn ends where the first answer starts.

    Raises:
        UserError: the chat template leaves out or changes a message, or writes no special token after an answer.
    """
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    text, spans, _ = render_messages(messages, tokenizer, answering=False)
    answers = [number for number, message in enumerate(chat.messages) if message.role == ASSISTANT]
    starts = [_start(messages[:number], text, spans[number][0], tokenizer) for number in answers]
    ids = list(encode_text(tokenizer, text[: starts[0]], _within(spans, 0, starts[0])).ids)
    firsts, learnt, end = [], [], 0
    for number, start, stop in zip(answers, starts, [*starts[1:], len(text)], strict=True):
        piece = encode_text(tokenizer, text[start:stop], _within(spans, start, stop))
        end = len(ids) + _count_to_end(piece, spans[number][1] - start, tokenizer)
        firsts.append(len(ids))
        if chat.messages[number].learnt:
            learnt.append((len(ids), end))
        ids += piece.ids
    if end > max_tokens:
        return TooLong(end)
    return Example(
        id=chat.id,
        # Text that the template writes after the last answer is dropped.
        input_ids=ids[:end],
        prompt_length=max(firsts[-1], 1),
        first_turn=max(firsts[0], 1),
        learnt=learnt,
        gold_spans=[],
        answer_spans=[],
        answers=[chat.messages[-1].content],
        match="any",
        task=chat.task,
        question=next((each.content for each in reversed(chat.messages) if each.role == "user"), ""),
    )


def _message(row: Mapping[str, Any]) -> Message:
    check_row(row, {"role": str, "content": str}, {"weight": int})
    role, weight = row["role"], row.get("weight")
    if role not in ROLES:
        raise UserError("role", role, " or ".join(ROLES))
    if not row["content"].strip():
        raise UserError("content", reason="is empty", allowed="a non-empty text")
    if weight is not None and (role != ASSISTANT or weight not in (0, 1)):
        raise UserError("weight", weight, "0 or 1, in messages of the assistant")
    return Message(role, row["content"], learnt=weight != 0)


def _start(before: Sequence[Mapping[str, str]], text: str, content: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the answer to the messages ``before`` starts in the text of a chat.

    This is the end of its prompt, if the text of the chat starts with that prompt; otherwise it is the start of its
    ``content`` (some templates render past answers differently).
    """
    prompt = render(before, tokenizer) if before else ""
    return len(prompt) if before and len(prompt) <= content and text.startswith(prompt) else content


def _count_to_end(piece: Tokens, content: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens up to the first special token after the content, which ends at the character ``content``."""
    special = special_ids(tokenizer)
    for place, (number, (_, end)) in enumerate(zip(piece.ids, piece.offsets, strict=True)):
        if number in special and end > content:
            return place + 1
    raise UserError("tokenizer", reason="its chat template writes no special token after an answer to end it")


def _within(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of spans inside [start, stop), relative to ``start``."""
    cut = ((max(first, start) - start, min(last, stop) - start) for first, last in spans)
    return [(first, last) for first, last in cut if first < last]
