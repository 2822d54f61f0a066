"""From a record to token ids: the prompt, the answer, and where the evidence lies.

One user message holds the passages, then an instruction, then the question; the assistant's message is the answer.
The context comes first so that its keys and values do not depend on the question; :func:`prompt_of` puts it otherwise.

The prompt and the answer are tokenised apart and joined, so that training sees exactly the prompt tokens that
generation starts from.
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
        message: the user's message; {context} stands for the passages, {input} for the question.
        answer: the beginning of the assistant's message, which the model is given, with {input}; a blank follows it.
        heading: what stands above a passage in place of its title; {number} counts from 1. "" shows the titles. None:
            passages are pieces of one text, shown exactly and without anything between them.
    """

    message: str
    answer: str = ""
    heading: str | None = ""

    @property
    def between(self) -> str:
        """What stands between two passages."""
        return "" if self.heading is None else SEPARATOR

    def passage(self, passage: Passage, number: int) -> str:
        """A passage, the ``number``-th of the context, as the prompt shows it."""
        if self.heading is None:
            return passage.text
        if not self.heading:
            return render_passage(passage)
        return f"{self.heading.replace('{number}', str(number))}\n{passage.text}".strip()

    def shown(self, passages: Sequence[Passage]) -> list[str]:
        """Each passage of a context, as the prompt shows it."""
        return [self.passage(passage, number) for number, passage in enumerate(passages, start=1)]

    def around(self, question: str) -> tuple[str, str]:
        """What stands before the passages and behind them."""
        before, after = self.message.split("{context}")
        return before.replace("{input}", question), after.replace("{input}", question)

    def later(self, question: str) -> str:
        """The message of a later turn, which asks about the passages of the first one."""
        return "".join(self.around(question.strip())).strip()


def prompt_of(key: str, message: str) -> Prompt:
    """A prompt with a message of the user's own, which may put the question before the passages, behind them, or both.

    The message must hold {context} once and {input} at least once; else a UserError names the setting ``key``.
    """
    for place, allowed in (("{context}", "once"), ("{input}", "once or more")):
        count = message.count(place)
        if not count or (count > 1 and allowed == "once"):
            raise UserError(key, reason=f"holds {place} {count} times", allowed=f"a text that holds it {allowed}")
    return Prompt(message.strip())


PROMPT = Prompt("{context}" + SEPARATOR + INSTRUCTION + SEPARATOR + "Question: {input}")
"""The project's own."""


class Example(TypedDict):
    """A tokenised record, with the record's id, answers, match and task.

    Attributes:
        input_ids: prompt tokens, then answer tokens with the end-of-message token; not padded.
        prompt_length: how many of ``input_ids`` are the prompt.
        context_length: how many of these come up to the end of the last passage, where what is asked stands behind
            them; all of the first turn where an example does not say it.
        first_turn: how many of these come before the first of several answers: all of them unless there were earlier
            turns.
        context_span: token positions [start, end) of the passages, empty where there are none; of a plain text all of
            its tokens. Missing where an example does not tell its context from what is asked, as in chats.
        gold_spans: token positions [start, end) of the supporting passages, in the order of the context.
        answer_spans: token positions [start, end) of the answers' occurrences within those passages.
        learnt: token positions [start, end) that have a loss, in order. Without it these are all behind the prompt; in
            a chat earlier turns are learnt as well.
        rejected: tokens of an answer to the same prompt that is worse than the one in ``input_ids``, with the
            end-of-message token; empty, or missing, where there is none.
        subject: what the context is about, where those of other questions are about it too without being the same.
        source: the name, within a mixture, of the data set that it comes from.
        repeated: whether it only fills up the share of one of several devices, and must not be counted.
        position: in its split.
        source_length: how many tokens the prompt has without a filter; ``prompt_length`` where it is missing.
        filtered: what a filter has kept of the context, by the names of a data set's report; not stored.
    """

    id: str
    input_ids: Sequence[int]
    prompt_length: int
    gold_spans: Sequence[Span]
    answer_spans: Sequence[Span]
    answers: Sequence[str]
    match: Match
    task: NotRequired[str]
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
    """Stands in for the example of a record that does not fit, with the prompt and answer tokens that it needs."""

    tokens: int


def encode(
    record: QARecord, tokenizer: PreTrainedTokenizerBase, max_tokens: int, prompt: Prompt = PROMPT
) -> Example | TooLong:
    """Tokenise a record; prompt and answer may have ``max_tokens`` together, and nothing is cut to meet that.

    Earlier turns follow the context as a cache would hold them: the tokens of their answers are those that are learnt
    where that turn is the last, and what the chat template writes between turns is tokenised apart.

    Raises:
        UserError: even without any passage the record needs more than ``max_tokens``, or the chat template does not
            keep the text of a message, or of an earlier turn.
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
    )


def prompt_tokens(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt = PROMPT) -> int:
    """Tokens of a record's prompt; errors as for :func:`render_prompt`."""
    rendered = render_prompt(record, tokenizer, prompt)
    return len(encode_text(tokenizer, rendered.text, rendered.user).ids) + len(_later_turns(record, tokenizer, prompt))


def render_prompt(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt = PROMPT) -> Rendered:
    """The prompt's text up to where the first answer starts; errors as for :func:`render_messages`."""
    asked = record.questions[0].strip()
    texts = prompt.shown(record.passages)
    before, after = prompt.around(asked)
    content = before + prompt.between.join(texts) + after if texts else (before + after).lstrip()
    text, [(start, end)], _ = render_messages([{"role": "user", "content": content}], tokenizer)
    # The template may have left out white space at the beginning.
    place = start - content.index(text[start:end]) + len(before)
    spans = []
    for passage in texts:
        spans.append((max(place, start), min(place + len(passage), end)))
        place += len(passage) + len(prompt.between)
    return Rendered(text + prompt.answer.replace("{input}", asked), [(start, end)], spans)


def _context_length(prompt: Tokens, rendered: Rendered) -> int:
    """Tokens up to the end of the last passage, the one that reaches beyond it included; all without passages."""
    return max(1, token_span(prompt.offsets, rendered.passages[-1])[1]) if rendered.passages else len(prompt.ids)


def _context_span(prompt: Tokens, rendered: Rendered) -> Span:
    """Tokens of the passages, those that reach beyond them included; without any none, where the message starts."""
    if not rendered.passages:
        start, _ = token_span(prompt.offsets, rendered.user[0])
        return start, start
    return token_span(prompt.offsets, (rendered.passages[0][0], rendered.passages[-1][1]))


def _later_turns(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens from the first answer of a conversation up to where its last one starts."""
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
    """A passage as the prompt shows it: its title on a line of its own, if it has one, then its text."""
    return f"{passage.title}\n{passage.text}".strip()


def find_answers(text: str, answers: Sequence[str], within: Span) -> Iterator[Span]:
    """Character spans of whole-word occurrences of any answer, ignoring case, in the order of the text.

    "yes" and "no" are judgements about the text, not places in it, and are not looked for.
    """
    words = [re.escape(answer.strip()) for answer in answers if answer.strip().lower() not in YES_NO]
    if words:
        longest_first = "|".join(sorted(words, key=len, reverse=True))
        pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)", re.IGNORECASE)
        yield from (found.span() for found in pattern.finditer(text, *within))


def token_span(offsets: Sequence[Span], span: Span) -> Span:
    """Positions [start, end) of the tokens that overlap a character span, which at least one does.

    ``offsets`` are the tokens' character spans, in order; several may share one (the bytes of a character).
    """
    return (
        bisect_right(offsets, span[0], key=lambda offset: offset[1]),
        bisect_left(offsets, span[1], key=lambda offset: offset[0]),
    )
