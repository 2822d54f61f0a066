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

    Args:
        tokenizer: a fast tokenizer with a chat template and an end-of-sequence token.
        text: what the questions are about.

    Attributes:
        ids: all tokens so far; before the first question those that are the same for every question.

    Raises:
        UserError: the chat template fails, or does not keep the text of a message.
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
        self.ids = tokens.ids[: bisect_right(tokens.offsets, stop, key=_end)]

    def ask(self, question: str) -> None:
        """Append a question, up to where its answer starts.

        Raises:
            UserError: the chat template rewrites earlier turns, so that a cache of them cannot be continued.
        """
        if self._answer is not None:
            _check_kept(self._tokenizer, self._answer)
        self.ids = [*self.ids, *self._added(question, first=self._answer is None)]
        self._answer = ""

    def take(self, answer: Sequence[int]) -> None:
        """Append the tokens of an answer, less the one that ended it: the next turn begins with the template's own."""
        kept = before_stop(answer, self._stops)
        self._answer = str(self._tokenizer.decode(kept))
        self.ids = [*self.ids, *kept]

    def tokens_with(self, questions: Sequence[str], answer_tokens: int) -> int:
        """Tokens there would be after further questions with answers of so many tokens.

        Raises:
            UserError: as :meth:`ask`.
        """
        added = [
            len(self._added(question, first=self._answer is None and number == 0))
            for number, question in enumerate(questions)
        ]
        return len(self.ids) + sum(added) + len(questions) * answer_tokens

    def _added(self, question: str, *, first: bool) -> list[int]:
        """The tokens of a question and of what the template writes before and behind it."""
        if first:
            return self._first(question)
        if not self._turns_checked:
            _check_turns(self._tokenizer)
            self._turns_checked = True
        turn = _turn(self._tokenizer, question)
        return encode_text(self._tokenizer, turn.text, turn.user).ids

    def _first(self, question: str) -> list[int]:
        """What a first question adds to the text: together they are a prompt of the training."""
        if self._prompt is None or self._prompt[0] != question:
            rendered = self._render_prompt(question)
            self._prompt = question, encode_text(self._tokenizer, rendered.text, rendered.user).ids
        ids, known = self._prompt[1], len(self.ids)
        if ids[:known] != self.ids:
            raise UserError(
                "tokenizer", reason="its chat template changes the text with the question, which a cache cannot"
            )
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


def _turn(tokenizer: PreTrainedTokenizerBase, question: str) -> Rendered:
    """What the chat template writes between an answer and the next one.

    The text is left out of the first message here: it does not change what follows an answer.

    Raises:
        UserError: the template rewrites what it wrote before the answer.
    """
    text, [_, (start, end), (first, last)], _ = render_messages(_conversation([_QUESTION, question]), tokenizer)
    # White space around an answer is the model's to write.
    if text[:start].rstrip() != render(_conversation([_QUESTION]), tokenizer).rstrip():
        raise UserError("tokenizer", reason=_REWRITES)
    return Rendered(text[end:], [(first - end, last - end)])


def _check_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a turn does not depend on those before it, so that it can be rendered alone.

    Raises:
        UserError: it does.
    """
    questions = [f"{_QUESTION} {number}" for number in range(4)]
    text, spans, _ = render_messages(_conversation(questions), tokenizer)
    answers = spans[1::2]
    ends = [start for start, _ in answers[1:]] + [len(text)]
    for question, (_, start), end in zip(questions[1:], answers, ends, strict=True):
        if text[start:end].rstrip() != _turn(tokenizer, question).text.rstrip():
            raise UserError("tokenizer", reason=_REWRITES)


def _check_kept(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    """Check that the chat template keeps an answer in the turns that follow: it may leave out what a model has thought.

    Raises:
        UserError: it does not.
    """
    before = render(_conversation([_QUESTION]), tokenizer).rstrip()
    rendered = render(_conversation([_QUESTION, _QUESTION], answer), tokenizer)
    if not rendered.removeprefix(before).lstrip().startswith(answer.strip()):
        raise UserError("tokenizer", reason=_REWRITES)


def _end(offset: tuple[int, int]) -> int:
    return offset[1]
