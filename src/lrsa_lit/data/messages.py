"""Rendering of messages by a chat template: the text, the positions of the contents, and the text of later turns."""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lrsa_lit.chat_template import render
from lrsa_lit.data.tokenization import Span
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED, ANSWERED = "(question)", "(answer)"
"""Placeholder messages, used to find out what the chat template writes around a message."""
_REWRITES = "its chat template rewrites earlier turns, which a cache cannot do; ask only one question"


class Rendered(NamedTuple):
    """Rendered messages, with the character spans of the messages' contents and of a prompt's passages."""

    text: str
    user: list[Span]
    passages: Sequence[Span] = ()


def render_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, answering: bool = True
) -> Rendered:
    """Render a conversation up to where the next answer starts, with the span of each message's content.

    If ``answering`` is false, only the conversation is rendered.

    Raises:
        UserError: the chat template leaves a message out, or changes more than the white space around its text.
    """
    # Random stand-ins occur nowhere else, so they show where the contents are, whatever the messages hold.
    stand_ins = [f"[{secrets.token_hex(16)}]" for _ in messages]
    marked = [{**message, "content": name} for message, name in zip(messages, stand_ins, strict=True)]
    outline = render(marked, tokenizer, answering=answering)
    for number, (message, name) in enumerate(zip(messages, stand_ins, strict=True)):
        # A template that writes contents in capitals keeps the message, though it changes it (an error below).
        if name not in outline.lower():
            raise UserError("tokenizer", reason=f"its chat template leaves out messages[{number}] ({message['role']})")
    between = re.split("|".join(map(re.escape, stand_ins)), outline)
    text = render(messages, tokenizer, answering=answering)
    spans: list[Span] = []
    end = len(between[0])
    if len(between) == len(messages) + 1 and text.startswith(between[0]):
        for message, behind in zip(messages, between[1:], strict=True):
            content = message["content"]
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            shown = next((form for form in forms if text.startswith(form + behind, end)), None)
            if shown is None:
                break
            spans.append((end, end + len(shown)))
            end += len(shown) + len(behind)
    if end != len(text) or len(spans) != len(messages):
        raise UserError("tokenizer", reason="its chat template changes the text of a message, which is not supported")
    return Rendered(text, spans)


def later_turn(tokenizer: PreTrainedTokenizerBase, content: str, answer: str = ANSWERED) -> Rendered:
    """Render what follows an answer: the next user message, up to where the next answer starts.

    Earlier turns are ignored; :func:`check_turns` checks that they make no difference.

    Raises:
        UserError: the template rewrites the answer or the text before it, for example by removing a model's thinking. A
            cache cannot be continued then.
    """
    before = render(_conversation([ASKED]), tokenizer).rstrip()
    messages = _conversation([ASKED, content], answer)
    # The model writes the white space around its answer, so only the stripped answer must match.
    if not render(messages, tokenizer).removeprefix(before).lstrip().startswith(answer.strip()):
        raise UserError("tokenizer", reason=_REWRITES)
    text, [_, (start, end), (first, last)], _ = render_messages(messages, tokenizer)
    if text[:start].rstrip() != before:
        raise UserError("tokenizer", reason=_REWRITES)
    return Rendered(text[end:], [(first - end, last - end)])


@functools.lru_cache(maxsize=4)
def check_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError if the rendering of a turn depends on earlier turns, so that it cannot be rendered alone."""
    contents = [f"{ASKED} {number}" for number in range(4)]
    text, spans, _ = render_messages(_conversation(contents), tokenizer)
    ends = [start for start, _ in spans[3::2]] + [len(text)]
    for content, (_, start), end in zip(contents[1:], spans[1::2], ends, strict=True):
        if text[start:end].rstrip() != later_turn(tokenizer, content).text.rstrip():
            raise UserError("tokenizer", reason=_REWRITES)


def _conversation(contents: Sequence[str], answer: str = ANSWERED) -> list[dict[str, str]]:
    """The user's messages with the same answer after each but the last."""
    messages = []
    for content in contents:
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages[:-1]
