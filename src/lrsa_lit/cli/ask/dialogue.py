"""A conversation about a text, as tokens that only ever grow: what a cache can follow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrsa_lit.chat_template import render
from lrsa_lit.data.prompts import PROMPT, Rendered, render_messages, render_prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError
from lrsa_lit.models.generation import before_stop, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION = "(question)"
_ANSWER = "(answer)"
"""Stand for messages where only what the chat template writes around them is wanted."""
_REWRITES = "its chat template rewrites earlier turns, which a cache cannot; ask one question only"


class Dialogue:
    """The token ids of a conversation about a text; every turn only appends to them.

    Answers stay as the model generated them, even where the chat template would trim white space from them.

    Attributes:
        ids: all tokens so far; before the first question those that are the same for every question.

    Raises:
        UserError: the chat template fails, does not keep the text of a message, or rewrites earlier turns, so that a
            cache of them cannot be continued.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        self._stops = stop_tokens(tokenizer)
        self._text = text
        # Tokenising a long text takes seconds, and the first question's prompt is needed twice.
        self._prompt: tuple[str, list[int]] | None = None
        self._answer: str | None = None
        self._turns_checked = False
        # Some question: a template may trim the message, whose end would be the blank before an empty one.
        rendered = self._render_prompt(_QUESTION)
        tokens = encode_text(tokenizer, rendered.text, rendered.user)
        ((_, stop),) = rendered.passages
        # A token that reaches beyond the text may be another one once the question is known.
        self.ids = tokens.ids[: bisect_right(tokens.offsets, stop, key=lambda offset: offset[1])]

    def ask(self, question: str) -> None:
        """Append a question, up to where its answer starts."""
        self.ids = [*self.ids, *self._added(question, self._answer)]

    def take(self, answer: Sequence[int]) -> None:
        """Append the tokens of an answer, less the one that ended it: the next turn begins with the template's own."""
        kept = before_stop(answer, self._stops)
        self._answer = str(self._tokenizer.decode(kept))
        self.ids = [*self.ids, *kept]

    def tokens_with(self, questions: Sequence[str], answer_tokens: int) -> int:
        """Tokens there would be after further questions with answers of so many tokens."""
        answers = [self._answer, *[_ANSWER] * len(questions)]
        added = [len(self._added(question, answer)) for question, answer in zip(questions, answers, strict=False)]
        return len(self.ids) + sum(added) + len(questions) * answer_tokens

    def _added(self, question: str, answer: str | None) -> list[int]:
        """The tokens of a question and of what the template writes before and behind it; None: no answer precedes."""
        if answer is None:
            return self._first(question)
        if not self._turns_checked:
            _check_turns(self._tokenizer)
            self._turns_checked = True
        turn = _turn(self._tokenizer, question, answer or _ANSWER)
        return encode_text(self._tokenizer, turn.text, turn.user).ids

    def _first(self, question: str) -> list[int]:
        """What a first question adds to the text: together they are a prompt of the training."""
        if self._prompt is None or self._prompt[0] != question:
            rendered = self._render_prompt(question)
            self._prompt = question, encode_text(self._tokenizer, rendered.text, rendered.user).ids
        ids, known = self._prompt[1], len(self.ids)
        if ids[:known] != self.ids:
            reason = "its chat template changes the text with the question, which a cache cannot"
            raise UserError("tokenizer", reason=reason)
        return ids[known:]

    def _render_prompt(self, question: str) -> Rendered:
        record = QARecord(id="ask", passages=(Passage("", self._text),), question=question, answers=())
        return render_prompt(record, self._tokenizer)


def _conversation(questions: Sequence[str], answer: str = _ANSWER) -> list[dict[str, str]]:
    """Messages of questions as the training puts them, without a text, with the same answer between them."""
    messages = []
    for question in questions:
        content = "".join(PROMPT.around(question.strip())).strip()
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages[:-1]


def _turn(tokenizer: PreTrainedTokenizerBase, question: str, answer: str = _ANSWER) -> Rendered:
    """What the chat template writes between an answer and the next one.

    It must not rewrite what it wrote before the answer, nor the answer: leave out what a model has thought, say. The
    text is left out of the first message here: it does not change what follows an answer.
    """
    before = render(_conversation([_QUESTION]), tokenizer).rstrip()
    messages = _conversation([_QUESTION, question], answer)
    # White space around an answer is the model's to write.
    if not render(messages, tokenizer).removeprefix(before).lstrip().startswith(answer.strip()):
        raise UserError("tokenizer", reason=_REWRITES)
    text, [_, (start, end), (first, last)], _ = render_messages(messages, tokenizer)
    if text[:start].rstrip() != before:
        raise UserError("tokenizer", reason=_REWRITES)
    return Rendered(text[end:], [(first - end, last - end)])


def _check_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a turn does not depend on those before it, so that it can be rendered alone."""
    questions = [f"{_QUESTION} {number}" for number in range(4)]
    text, spans, _ = render_messages(_conversation(questions), tokenizer)
    ends = [start for start, _ in spans[3::2]] + [len(text)]
    for question, (_, start), end in zip(questions[1:], spans[1::2], ends, strict=True):
        if text[start:end].rstrip() != _turn(tokenizer, question).text.rstrip():
            raise UserError("tokenizer", reason=_REWRITES)
