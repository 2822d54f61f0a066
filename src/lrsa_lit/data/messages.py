"""What a chat template makes of messages: their text, where their contents are in it, and what a later turn adds."""

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
"""Stand for messages where only what the chat template writes around them is wanted."""
_REWRITES = "its chat template rewrites earlier turns, which a cache cannot; ask one question only"


class Rendered(NamedTuple):
    """What a chat template makes of messages, and where in it the messages' contents and a prompt's passages are."""

    text: str
    user: list[Span]
    passages: Sequence[Span] = ()


def render_messages(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, answering: bool = True
) -> Rendered:
    """A conversation up to where the next answer starts, with the place of each message's content.

    Not ``answering``, it is the conversation alone.

    Raises:
        UserError: the chat template leaves a message out, or changes its text, white space around it aside.
    """
    # Whatever the messages hold, their places are those of contents that can stand nowhere else.
    stand_ins = [f"[{secrets.token_hex(16)}]" for _ in messages]
    marked = [{**message, "content": name} for message, name in zip(messages, stand_ins, strict=True)]
    outline = render(marked, tokenizer, answering=answering)
    for number, (message, name) in enumerate(zip(messages, stand_ins, strict=True)):
        # One in capitals is there, though changed.
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
    """What the chat template writes behind an answer, up to where that to another message of the user starts.

    Nothing before it is looked at: :func:`check_turns` says whether that makes a difference.

    Raises:
        UserError: the template rewrites what it wrote before the answer, or the answer: leaves out what a model has
            thought, say. A cache of it cannot be continued.
    """
    before = render(_conversation([ASKED]), tokenizer).rstrip()
    messages = _conversation([ASKED, content], answer)
    # White space around an answer is the model's to write.
    if not render(messages, tokenizer).removeprefix(before).lstrip().startswith(answer.strip()):
        raise UserError("tokenizer", reason=_REWRITES)
    text, [_, (start, end), (first, last)], _ = render_messages(messages, tokenizer)
    if text[:start].rstrip() != before:
        raise UserError("tokenizer", reason=_REWRITES)
    return Rendered(text[end:], [(first - end, last - end)])


@functools.lru_cache(maxsize=4)
def check_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError unless a turn does not depend on those before it, so that it can be rendered alone."""
    contents = [f"{ASKED} {number}" for number in range(4)]
    text, spans, _ = render_messages(_conversation(contents), tokenizer)
    ends = [start for start, _ in spans[3::2]] + [len(text)]
    for content, (_, start), end in zip(contents[1:], spans[1::2], ends, strict=True):
        if text[start:end].rstrip() != later_turn(tokenizer, content).text.rstrip():
            raise UserError("tokenizer", reason=_REWRITES)


def _conversation(contents: Sequence[str], answer: str = ANSWERED) -> list[dict[str, str]]:
    """Messages of the user with the same answer between them."""
    messages = []
    for content in contents:
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages[:-1]
