"""From a record to token ids: the prompt, the answer, and where the evidence lies.

One user message holds the passages, then an instruction, then the question; the assistant's message is the answer.
The context comes first so that its keys and values do not depend on the question; :func:`prompt_of` puts it otherwise.

The prompt and the answer are tokenised apart and joined, so that training sees exactly the prompt tokens that
generation starts from.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict

from lrsa_lit.chat_template import render
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
        answer: the beginning of the assistant's message, which the model is given; a blank follows it.
        heading: what stands above a passage in place of its title; {number} counts from 1. "" shows the titles.
    """

    message: str
    answer: str = ""
    heading: str = ""

    def passage(self, passage: Passage, number: int) -> str:
        """A passage, the ``number``-th of the context, as the prompt shows it."""
        if not self.heading:
            return render_passage(passage)
        return f"{self.heading.replace('{number}', str(number))}\n{passage.text}".strip()

    def around(self, question: str) -> tuple[str, str]:
        """What stands before the passages and behind them."""
        before, after = self.message.split("{context}")
        return before.replace("{input}", question), after.replace("{input}", question)


def prompt_of(key: str, message: str) -> Prompt:
    """A prompt with a message of the user's own, which may put the question before the passages, behind them, or both.

    Args:
        key: of the setting that holds it.
        message: with {context} once and {input} at least once.

    Raises:
        UserError: it lacks one of them, or has {context} more than once.
    """
    for place, allowed in (("{context}", "once"), ("{input}", "once or more")):
        count = message.count(place)
        if not count or (count > 1 and allowed == "once"):
            raise UserError(key, reason=f"holds {place} {count} times", allowed=f"a text that holds it {allowed}")
    return Prompt(message.strip())


PROMPT = Prompt("{context}" + SEPARATOR + INSTRUCTION + SEPARATOR + "Question: {input}")
"""The project's own."""


class Example(TypedDict):
    """A tokenised record.

    Attributes:
        id: the record's.
        input_ids: prompt tokens, then answer tokens with the end-of-message token; not padded.
        prompt_length: how many of ``input_ids`` are the prompt.
        gold_spans: token positions [start, end) of the supporting passages, in the order of the context.
        answer_spans: token positions [start, end) of the answers' occurrences within those passages.
        answers: the record's.
        match: the record's.
        task: the record's, if it has one.
        subject: what the context is about, where those of other questions are about it too without being the same.
        source: the name, within a mixture, of the data set that it comes from.
        repeated: whether it only fills up the share of one of several devices, and must not be counted.
        position: in its split.
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
    source: NotRequired[str]
    repeated: NotRequired[bool]
    position: NotRequired[int]


@dataclass(frozen=True)
class TooLong:
    """Stands in for the example of a record that does not fit.

    Attributes:
        tokens: the prompt and answer tokens it needs.
    """

    tokens: int


def checked(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, known to be fast and to have a chat template and an end-of-sequence token.

    Raises:
        UserError: it lacks one of them, or there is none.
    """
    if tokenizer is None:
        raise UserError("tokenizer", reason="none is given", allowed="the model's")
    for name, value in (
        ("backend_tokenizer (it is not a fast tokenizer)", getattr(tokenizer, "backend_tokenizer", None)),
        ("chat_template", tokenizer.chat_template),
        ("eos_token", tokenizer.eos_token),
    ):
        if not value:
            raise UserError("tokenizer", tokenizer.name_or_path or "the tokenizer", reason=f"has no {name}")
    return tokenizer


def encode(
    record: QARecord, tokenizer: PreTrainedTokenizerBase, max_tokens: int, prompt: Prompt = PROMPT
) -> Example | TooLong:
    """Tokenise a record.

    Args:
        record: the question with its context.
        tokenizer: a fast tokenizer with a chat template and an end-of-sequence token.
        max_tokens: budget of prompt and answer together; nothing is cut to meet it.
        prompt: how the question is put.

    Raises:
        UserError: even without any passage the record needs more than ``max_tokens``, or the chat template does not
            keep the text of a message.
    """
    rendered = render_prompt(record, tokenizer, prompt)
    question = encode_text(tokenizer, rendered.text, rendered.user)
    answer = _encode_answer(record, tokenizer, prompt)
    length = len(question.ids) + len(answer.ids)
    if length > max_tokens:
        _check_bare(record, tokenizer, max_tokens, len(answer.ids), prompt)
        return TooLong(length)
    spans = zip(record.passages, rendered.passages, strict=True)
    gold = [span for passage, span in spans if _supports(record, passage)]
    answers = [found for span in gold for found in find_answers(rendered.text, record.answers, span)]
    example = Example(
        id=record.id,
        input_ids=question.ids + answer.ids,
        prompt_length=len(question.ids),
        gold_spans=[token_span(question.offsets, span) for span in gold],
        answer_spans=[token_span(question.offsets, span) for span in answers],
        answers=list(record.answers),
        match=record.match,
    )
    if record.task:
        example["task"] = record.task
    return example


class Rendered(NamedTuple):
    """What a chat template makes of messages.

    Attributes:
        text: the whole.
        user: character spans [start, end) of the messages' contents in it, which :func:`encode_text` takes.
        passages: character spans of the passages of a prompt.
    """

    text: str
    user: list[Span]
    passages: Sequence[Span] = ()


def render_prompt(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt = PROMPT) -> Rendered:
    """The prompt's text up to where the answer starts.

    Raises:
        UserError: the chat template does not keep the text of a message.
    """
    texts = [prompt.passage(passage, number) for number, passage in enumerate(record.passages, start=1)]
    before, after = prompt.around(record.question.strip())
    content = before + SEPARATOR.join(texts) + after if texts else (before + after).lstrip()
    text, [(start, end)], _ = render_messages([{"role": "user", "content": content}], tokenizer)
    # The template may have left out white space at the beginning.
    place = start - content.index(text[start:end]) + len(before)
    spans = []
    for passage in texts:
        spans.append((max(place, start), min(place + len(passage), end)))
        place += len(passage) + len(SEPARATOR)
    return Rendered(text + prompt.answer, [(start, end)], spans)


def render_messages(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A conversation up to where the next answer starts, with the place of each message's content.

    Args:
        messages: each with a role and a content.
        tokenizer: with a chat template, which may leave out white space around a content.

    Raises:
        UserError: the chat template changes the text of a message in any other way.
    """
    # Whatever the messages hold, their places are those of contents that can stand nowhere else.
    stand_ins = [f"[{secrets.token_hex(16)}]" for _ in messages]
    marked = [{**message, "content": name} for message, name in zip(messages, stand_ins, strict=True)]
    between = re.split("|".join(map(re.escape, stand_ins)), render(marked, tokenizer))
    text = render(messages, tokenizer)
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
    """Positions [start, end) of the tokens that overlap a character span.

    Args:
        offsets: character span of each token, in order; several tokens may share one (the bytes of a character).
        span: a character span that at least one token overlaps.
    """
    return (
        bisect_right(offsets, span[0], key=lambda offset: offset[1]),
        bisect_left(offsets, span[1], key=lambda offset: offset[0]),
    )


def _encode_answer(record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Tokens:
    """The answer to learn and the end-of-message token."""
    target = f" {record.target}" if prompt.answer else record.target
    return encode_text(tokenizer, target + str(tokenizer.eos_token), [(0, len(target))])


def _supports(record: QARecord, passage: Passage) -> bool:
    return passage.title in record.supporting_titles


def _check_bare(
    record: QARecord, tokenizer: PreTrainedTokenizerBase, max_tokens: int, answer_tokens: int, prompt: Prompt
) -> None:
    bare = render_prompt(replace(record, passages=()), tokenizer, prompt)
    needed = len(encode_text(tokenizer, bare.text, bare.user).ids) + answer_tokens
    if needed > max_tokens:
        allowed = f"{needed} or more, which question {record.id} needs even without any context"
        raise UserError("max_tokens", max_tokens, allowed)
