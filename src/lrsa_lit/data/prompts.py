"""From a record to token ids: the prompt, the answer, and where the evidence lies.

One user message holds the passages, then an instruction, then the question; the assistant's message is the answer.
The context comes first so that its keys and values do not depend on the question; :func:`prompt_of` puts it otherwise.

The prompt and the answer are tokenised apart and joined, so that training sees exactly the prompt tokens that
generation starts from.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NotRequired, TypeAlias, TypedDict

from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.errors import UserError
from lrsa_lit.metrics import Match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
INSTRUCTION = "Answer the question from the text above. Give only the answer, without any other words."
YES_NO = frozenset({"yes", "no"})

Span: TypeAlias = tuple[int, int]


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
            raise UserError(f"{key} holds {place} {count} times, allowed is {allowed}")
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
        raise UserError("data.init_args.tokenizer is null; a tokenizer is needed, the model's when run by `lrsa`")
    for name, value in (
        ("backend_tokenizer (it is not a fast tokenizer)", getattr(tokenizer, "backend_tokenizer", None)),
        ("chat_template", tokenizer.chat_template),
        ("eos_token", tokenizer.eos_token),
    ):
        if not value:
            raise UserError(f"model.tokenizer: {tokenizer.name_or_path or 'the tokenizer'} has no {name}")
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
    text, passages = render_prompt(record, tokenizer, prompt)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    target = f" {record.target}" if prompt.answer else record.target
    answer_ids = tokenizer(target + str(tokenizer.eos_token), add_special_tokens=False)["input_ids"]
    length = len(encoding["input_ids"]) + len(answer_ids)
    if length > max_tokens:
        _check_bare(record, tokenizer, max_tokens, len(answer_ids), prompt)
        return TooLong(length)
    gold = [span for passage, span in zip(record.passages, passages, strict=True) if _supports(record, passage)]
    answers = [found for span in gold for found in find_answers(text, record.answers, span)]
    offsets = encoding["offset_mapping"]
    example = Example(
        id=record.id,
        input_ids=encoding["input_ids"] + answer_ids,
        prompt_length=len(encoding["input_ids"]),
        gold_spans=[token_span(offsets, span) for span in gold],
        answer_spans=[token_span(offsets, span) for span in answers],
        answers=list(record.answers),
        match=record.match,
    )
    if record.task:
        example["task"] = record.task
    return example


def render_prompt(
    record: QARecord, tokenizer: PreTrainedTokenizerBase, prompt: Prompt = PROMPT
) -> tuple[str, list[Span]]:
    """The prompt's text up to where the answer starts, and the character span of each passage in it."""
    texts = [prompt.passage(passage, number) for number, passage in enumerate(record.passages, start=1)]
    before, after = prompt.around(record.question.strip())
    content = before + SEPARATOR.join(texts) + after if texts else (before + after).lstrip()
    messages = [{"role": "user", "content": content}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)) + prompt.answer
    start = text.find(content)
    if start < 0:
        raise UserError("model.tokenizer: its chat template changes the text of a message, which is not supported")
    start += len(before)
    spans = []
    for passage in texts:
        spans.append((start, start + len(passage)))
        start += len(passage) + len(SEPARATOR)
    return text, spans


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


def _supports(record: QARecord, passage: Passage) -> bool:
    return passage.title in record.supporting_titles


def _check_bare(
    record: QARecord, tokenizer: PreTrainedTokenizerBase, max_tokens: int, answer_tokens: int, prompt: Prompt
) -> None:
    bare, _ = render_prompt(replace(record, passages=()), tokenizer, prompt)
    needed = len(tokenizer(bare, add_special_tokens=False)["input_ids"]) + answer_tokens
    if needed > max_tokens:
        raise UserError(
            f"data.init_args.max_tokens is {max_tokens}, but question {record.id} needs {needed} tokens "
            f"even without any context; allowed is {needed} or more"
        )
