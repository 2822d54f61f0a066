"""A conversation about a text, as tokens that only ever grow: what a cache can follow."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lrsa_lit.data.prompts import INSTRUCTION, SEPARATOR, render_prompt
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.errors import UserError
from lrsa_lit.models.generation import before_stop, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "(answer)"
"""Stands for an answer where only what the chat template writes around it is wanted."""


class Dialogue:
    """The token ids of a conversation about a text; every turn only appends to them.

    Args:
        tokenizer: a fast tokenizer with a chat template and an end-of-sequence token.
        text: what the questions are about.

    Attributes:
        ids: all tokens so far; before the first question those that are the same for every question.

    Raises:
        UserError: the chat template does not keep the text of a message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        self._stops = stop_tokens(tokenizer)
        self._text = text
        self._asked: list[str] = []
        prompt, _, [(_, stop)] = render_prompt(_record("", text), tokenizer)
        encoding = self._encode(prompt, return_offsets_mapping=True)
        # Long texts take seconds to tokenise, and copies of this object need the same ones again.
        self._prompts: dict[str, list[int]] = {"": encoding["input_ids"]}
        # A token that reaches beyond the text may be another one once the question is known.
        self.ids = self._prompts[""][: bisect_right(encoding["offset_mapping"], stop, key=_end)]

    def ask(self, question: str) -> None:
        """Append a question, up to where its answer starts.

        Raises:
            UserError: the chat template rewrites earlier turns, so that a cache of them cannot be continued.
        """
        if self._asked:
            self.ids = self.ids + self._encode(self._turn(question))["input_ids"]
        else:
            ids = self._prompt(question)
            assert ids[: len(self.ids)] == self.ids, "the question changes tokens of the text before it"
            self.ids = ids
        self._asked.append(question)

    def take(self, answer: Sequence[int]) -> None:
        """Append the tokens of an answer, less the one that ended it: the next turn begins with the template's own."""
        self.ids = [*self.ids, *before_stop(answer, self._stops)]

    def tokens_with(self, questions: Sequence[str], answer_tokens: int) -> int:
        """Tokens there would be after further questions with answers of so many tokens."""
        trial = copy.copy(self)
        trial._asked = list(self._asked)
        for question in questions:
            trial.ask(question)
            trial.take([-1] * answer_tokens)
        return len(trial.ids)

    def _prompt(self, question: str) -> list[int]:
        """The text and a first question, in the words of the training prompts."""
        if question not in self._prompts:
            prompt, *_ = render_prompt(_record(question, self._text), self._tokenizer)
            self._prompts[question] = self._encode(prompt)["input_ids"]
        return self._prompts[question]

    def _turn(self, question: str) -> str:
        """What the chat template writes between the last answer and the next one.

        The text is left out of the first message here: it does not change what follows an answer.
        """
        # The wording of training up to the first answer, not this module's: so the two are held to be the same.
        fed, *_ = render_prompt(_record(self._asked[0]), self._tokenizer)
        messages = [{"role": "user", "content": _wording(self._asked[0])}]
        for later in [*self._asked[1:], question]:
            messages += [{"role": "assistant", "content": _STAND_IN}, {"role": "user", "content": _wording(later)}]
            rendered = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            if not rendered.startswith(fed + _STAND_IN):
                raise UserError(
                    "--model: its chat template rewrites earlier turns, which a cache cannot; ask one question only"
                )
            turn, fed = rendered.removeprefix(fed + _STAND_IN), rendered
        return turn

    def _encode(self, text: str, **options: Any) -> Any:
        # Not verbose: it would warn that a long text is longer than the tokenizer's idea of the model.
        return self._tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _record(question: str, text: str | None = None) -> QARecord:
    passages = () if text is None else (Passage("", text),)
    return QARecord(id="ask", passages=passages, question=question, answers=())


def _wording(question: str) -> str:
    """A question as the training prompts put it, without a text."""
    return SEPARATOR.join([INSTRUCTION, f"Question: {question.strip()}"])


def _end(offset: tuple[int, int]) -> int:
    return offset[1]
