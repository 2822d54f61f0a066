"""A conversation about a text as token ids; every turn only appends to them, so that a cache can be continued."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrsa_lit.data.messages import ANSWERED, ASKED, Rendered, check_turns, later_turn
from lrsa_lit.data.prompts import PROMPT, render_prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.tokenization import encode_text
from lrsa_lit.errors import UserError
from lrsa_lit.models.generation import before_stop, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Dialogue:
    """The token ids of a conversation about a text; every turn only appends to them.

    Answers stay as the model generated them, even where the chat template would trim white space from them.

    Attributes:
        ids: all tokens so far; before the first question, the tokens that are the same for every question.

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
        # The question is not empty, because a template may trim the blank that the message would then end with.
        rendered = self._render_prompt(ASKED)
        tokens = encode_text(tokenizer, rendered.text, rendered.user)
        ((_, stop),) = rendered.passages
        # A token that extends beyond the text may change with the question.
        self.ids = tokens.ids[: bisect_right(tokens.offsets, stop, key=lambda offset: offset[1])]

    def ask(self, question: str) -> None:
        """Append a question, up to where its answer starts."""
        self.ids = [*self.ids, *self._added(question, self._answer)]

    def take(self, answer: Sequence[int]) -> None:
        """Append the tokens of an answer, without its stop token: the next turn starts with the template's own."""
        kept = before_stop(answer, self._stops)
        self._answer = str(self._tokenizer.decode(kept))
        self.ids = [*self.ids, *kept]

    def tokens_with(self, questions: Sequence[str], answer_tokens: int) -> int:
        """The number of tokens after further questions with answers of ``answer_tokens`` tokens each."""
        answers = [self._answer, *[ANSWERED] * len(questions)]
        added = [len(self._added(question, answer)) for question, answer in zip(questions, answers, strict=False)]
        return len(self.ids) + sum(added) + len(questions) * answer_tokens

    def _added(self, question: str, answer: str | None) -> list[int]:
        """The tokens of a question and of the template's text around it; ``answer`` is the one before, or None."""
        if answer is None:
            return self._first(question)
        check_turns(self._tokenizer)
        turn = later_turn(self._tokenizer, PROMPT.later(question), answer or ANSWERED)
        return encode_text(self._tokenizer, turn.text, turn.user).ids

    def _first(self, question: str) -> list[int]:
        """The tokens that a first question adds to the text; together they are a training prompt."""
        if self._prompt is None or self._prompt[0] != question:
            rendered = self._render_prompt(question)
            self._prompt = question, encode_text(self._tokenizer, rendered.text, rendered.user).ids
        ids, known = self._prompt[1], len(self.ids)
        if ids[:known] != self.ids:
            reason = "its chat template changes the text with the question, but a cache cannot change"
            raise UserError("tokenizer", reason=reason)
        return ids[known:]

    def _render_prompt(self, question: str) -> Rendered:
        record = QARecord(id="ask", passages=(Passage("", self._text),), question=question, answers=())
        return render_prompt(record, self._tokenizer)
