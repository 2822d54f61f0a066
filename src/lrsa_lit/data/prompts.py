"""Tokenisation of records: the prompt, the answer, and the positions of the evidence.

One user message holds the passages, then an instruction, then the question. The assistant's message is the answer. The
context comes first so that its keys and values do not depend on the question; :func:`prompt_of` makes prompts in
another order.

Prompt and answer are tokenised separately and concatenated, so training sees exactly the prompt tokens that generation
starts from.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NotRequired, TypedDict

from lrsa_lit.data.messages import Rendered, check_turns, later_turn, render_messages
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.data.tokenization import Span, Tokens, encode_text
from lrsa_lit.errors import UserError
from lrsa_lit.evaluation.answer_scores import Match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
INSTRUCTION = "Answer the question from the text above. Give only the answer, without any other words."
YES_NO = frozenset({"yes", "no"})


@dataclass(frozen=True)
class Prompt:
    """How a question is put to the model.

    Attributes:
        message: template of the user's message; {context} is replaced by the passages, {input} by the question.
        answer: given start of the assistant's message, which may use {input}; a space follows it.
        heading: heading of each passage in place of its title; {number} counts from 1. "" shows the titles. None means
            that passages are pieces of one text, which are joined unchanged.
    """

    message: str
    answer: str = ""
    heading: str | None = ""

    @property
    def between(self) -> str:
        """The separator between two passages."""
        return "" if self.heading is None else SEPARATOR

    def passage(self, passage: Passage, number: int) -> str:
        """The text of a passage in the prompt; ``number`` is its position in the context, from 1."""
        if self.heading is None:
            return passage.text
        if not self.heading:
            return render_passage(passage)
        return f"{self.heading.replace('{number}', str(number))}\n{passage.text}".strip()

    def shown(self, passages: Sequence[Passage]) -> list[str]:
        """The texts of all passages in the prompt."""
        return [self.passage(passage, number) for number, passage in enumerate(passages, start=1)]

    def around(self, question: str) -> tuple[str, str]:
        """The texts before and after the passages."""
        before, after = self.message.split("{context}")
        return before.replace("{input}", question), after.replace("{input}", question)

    def later(self, question: str) -> str:
        """The user's message in a later turn: the same template without the passages."""
        return "".join(self.around(question.strip())).strip()


def prompt_of(key: str, message: str) -> Prompt:
    """Make a prompt from a custom template, which may put the question before the passages, after them, or both.

    Raises:
        UserError: the message does not hold {context} exactly once and {input} at least once. The error names ``key``.
    """
    for place, allowed in (("{context}", "once"), ("{input}", "once or more")):
        count = message.count(place)
        if not count or (count > 1 and allowed == "once"):
            raise UserError(key, reason=f"holds {place} {count} times", allowed=f"a text that holds it {allowed}")
    return Prompt(message.strip())


PROMPT = Prompt("{context}" + SEPARATOR + INSTRUCTION + SEPARATOR + "Question: {input}")
"""The default prompt."""


class Example(TypedDict):
    """A tokenised record, with the record's id, answers, match and task.

    Attributes:
        input_ids: prompt tokens, then answer tokens with the end-of-message token; not padded.
        prompt_length: number of prompt tokens in ``input_ids``.
        context_length: number of prompt tokens up to the end of the last passage; the question follows. If missing, the
            whole first turn (``first_turn``).
        first_turn: number of prompt tokens before the first answer of a conversation; the whole prompt if there are no
            earlier turns.
        context_span: token positions [start, end) of the passages; empty if there are none. In a plain text, all
            tokens. Missing if context and question are not separate, as in chats.
        gold_spans: token positions [start, end) of the supporting passages, in the order of the context.
        answer_spans: token positions [start, end) of the answers' occurrences in those passages.
        learnt: token positions [start, end) that have a loss, in order. If missing, all tokens after the prompt. In
            chats, earlier answers are learnt as well.
        rejected: tokens of a worse answer to the same prompt, with the end-of-message token; empty or missing if there
            is none.
        question: the question, or the user's last message of a chat; missing if nothing is asked.
        subject: name of the context's subject, if the contexts of several questions share a subject but not the text.
        source: name of the example's data set in a mixture.
        repeated: whether the example only fills up a device's share and must not be counted.
        position: position in the split.
        source_length: number of prompt tokens without a filter; ``prompt_length`` if missing.
        filtered: counts of what a filter kept of the context, named as in a data set's report; not stored.
    """

    id: str
    input_ids: Sequence[int]
    prompt_length: int
    gold_spans: Sequence[Span]
    answer_spans: Sequence[Span]
    answers: Sequence[str]
    match: Match
    task: NotRequired[str]
    question: NotRequired[str]
    subject: NotRequired[str]
    context_length: NotRequired[int]
    first_turn: NotRequired[int]
    context_span: NotRequired[Span]
    learnt: NotRequired[Sequence[Span]]
    rejected: NotRequired[Sequence[int]]
    source: NotRequired[str]
    repeated: NotRequired[bool]
    position: NotRequired[int]
    source_length: NotRequired[int]
    filtered: NotRequired[Mapping[str, int]]


@dataclass(frozen=True)
class TooLong:
    """Returned in place of an example that does not fit; ``tokens`` is what prompt and answer need together."""

    tokens: int


def encode(
    record: QARecord, tokenizer: PreTrainedTokenizerBase, max_tokens: int, prompt: Prompt = PROMPT
) -> Example | TooLong:
    """Tokenise a record; prompt and answer together may have ``max_tokens`` tokens, and nothing is cut.

    Earlier turns are tokenised as a cache would hold them: their answers have the same tokens as when they are learnt,
    and the chat template's text between turns is tokenised separately.

    Raises:
        UserError: the record needs more than ``max_tokens`` even without passages, or the chat template changes the
            text of a message or of an earlier turn.
    """
    rendered = render_prompt(record, tokenizer, prompt)
    question = encode_text(tokenizer, rendered.text, rendered.user)
    later = _later_turns(record, tokenizer, prompt)
    target = f" {record.target}" if prompt.answer else record.target
    answer = encode_text(tokenizer, target + str(tokenizer.eos_token), [(0, len(target))])
    length = len(question.ids) + len(later) + len(answer.ids)
    if length > max_tokens:
        bare = render_prompt(replace(record, passages=()), tokenizer, prompt)
        needed = len(encode_text(tokenizer, bare.text, bare.user).ids) + len(later) + len(answer.ids)
        if needed > max_tokens:
            allowed = f"{needed} or more, which question {record.id} needs even without any context"
            raise UserError("max_tokens", max_tokens, allowed)
        return TooLong(length)
    spans = zip(record.passages, rendered.passages, strict=True)
    gold = [span for passage, span in spans if passage.title in record.supporting_titles]
    answers = [found for span in gold for found in find_answers(rendered.text, record.answers, span)]
    return Example(
        id=record.id,
        input_ids=question.ids + later + answer.ids,
        prompt_length=len(question.ids) + len(later),
        context_length=_context_length(question, rendered),
        first_turn=len(question.ids),
        context_span=_context_span(question, rendered),
        gold_spans=[token_span(question.offsets, span) for span in gold],
        answer_spans=[token_span(question.offsets, span) for span in answers],
        answers=list(record.answers),
        match=record.match,
        task=record.task,
        question=record.question.strip(),
    )


def prompt_tokens(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt = PROMPT) -> int:
    """Number of tokens of a record's prompt; raises as :func:`render_prompt`."""
    rendered = render_prompt(record, tokenizer, prompt)
    return len(encode_text(tokenizer, rendered.text, rendered.user).ids) + len(_later_turns(record, tokenizer, prompt))


def render_prompt(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt = PROMPT) -> Rendered:
    """Render the prompt up to where the first answer starts; raises as :func:`render_messages`."""
    asked = record.questions[0].strip()
    texts = prompt.shown(record.passages)
    before, after = prompt.around(asked)
    content = before + prompt.between.join(texts) + after if texts else (before + after).lstrip()
    text, [(start, end)], _ = render_messages([{"role": "user", "content": content}], tokenizer)
    # The template may have stripped leading white space.
    place = start - content.index(text[start:end]) + len(before)
    spans = []
    for passage in texts:
        spans.append((max(place, start), min(place + len(passage), end)))
        place += len(passage) + len(prompt.between)
    return Rendered(text + prompt.answer.replace("{input}", asked), [(start, end)], spans)


def _context_length(prompt: Tokens, rendered: Rendered) -> int:
    """Number of tokens up to the end of the last passage, including one that crosses it; without passages, all."""
    return max(1, token_span(prompt.offsets, rendered.passages[-1])[1]) if rendered.passages else len(prompt.ids)


def _context_span(prompt: Tokens, rendered: Rendered) -> Span:
    """Span of the passages, including tokens that cross its ends; without passages, empty at the message's start."""
    if not rendered.passages:
        start, _ = token_span(prompt.offsets, rendered.user[0])
        return start, start
    return token_span(prompt.offsets, (rendered.passages[0][0], rendered.passages[-1][1]))


def _later_turns(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens of a conversation from its first answer up to where its last answer starts."""
    if not record.turns:
        return []
    check_turns(tokenizer)
    ids = []
    for turn, question in zip(record.turns, record.questions[1:], strict=True):
        given = f" {turn.answer}" if prompt.answer else turn.answer
        begun = prompt.answer.replace("{input}", question.strip())
        following = later_turn(tokenizer, prompt.later(question), turn.answer)
        ids += encode_text(tokenizer, given).ids
        ids += encode_text(tokenizer, following.text + begun, following.user).ids
    return ids


def render_passage(passage: Passage) -> str:
    """A passage's title on a separate line, if it has one, followed by its text."""
    return f"{passage.title}\n{passage.text}".strip()


def find_answers(text: str, answers: Sequence[str], within: Span) -> Iterator[Span]:
    """Character spans of whole-word occurrences of any answer, ignoring case, in the order of the text.

    "yes" and "no" are judgements about the text, not parts of it, so they are not searched for.
    """
    words = [re.escape(answer.strip()) for answer in answers if answer.strip().lower() not in YES_NO]
    if words:
        longest_first = "|".join(sorted(words, key=len, reverse=True))
        pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)", re.IGNORECASE)
        yield from (found.span() for found in pattern.finditer(text, *within))


def token_span(offsets: Sequence[Span], span: Span) -> Span:
    """Positions [start, end) of the tokens that overlap a character span; at least one token must.

    ``offsets`` are the tokens' character spans, in order; several tokens may share one (the bytes of a character).
    """
    return (
        bisect_right(offsets, span[0], key=lambda offset: offset[1]),
        bisect_left(offsets, span[1], key=lambda offset: offset[0]),
    )
