"""Base classes of context filters, which shorten a record's context and report what it lost."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lrsa_lit.bounds import check_setting, is_integer, is_weight
from lrsa_lit.data import fingerprint
from lrsa_lit.data.filters.sentences import Sentence, sentences_of
from lrsa_lit.data.prompts import PROMPT, Prompt, find_answers, prompt_tokens
from lrsa_lit.data.records import Passage, QARecord, is_in
from lrsa_lit.data.tokenization import token_counts
from lrsa_lit.errors import UserError
from lrsa_lit.from_settings import FromSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "x"


@dataclass(frozen=True)
class Filtered:
    """A record with a shortened context, and which of its sentences were kept.

    Attributes:
        record: the shortened record. Empty passages are removed, also from ``supporting_titles``, and
            ``supporting_sentences`` holds only sentences that are still whole.
        source: the original record.
        kept: sentences of the source that are still whole, in order.
        dropped: the other sentences (cut, rewritten or removed), in order.
        tokens: tokens of the source's context in the prompt.
        tokens_left: tokens of the shortened context in the prompt.
    """

    record: QARecord
    source: QARecord
    kept: tuple[Sentence, ...]
    dropped: tuple[Sentence, ...]
    tokens: int
    tokens_left: int

    @property
    def context(self) -> str:
        """Digest of the unfiltered context, which several questions may share: 12 hex digits."""
        return hashlib.sha256(repr(self.source.passages).encode()).hexdigest()[:12]

    def counts(self) -> dict[str, int]:
        """Counts that a data set sums over its questions: for each measure, the total and what is left.

        An answer is left if it occurs in what is left of the supporting passages, or of all passages if none are named
        as supporting. One of several alternative answers is enough. Questions whose answer does not occur in the
        source, such as yes/no questions, are not counted.
        """
        before, after = self.source, self.record
        written = _has_answer(before, before)
        return {
            "filtered": 1,
            "filtered without context": int(not after.passages),
            "context tokens": self.tokens,
            "context tokens left": self.tokens_left,
            "sentences": len(self.kept) + len(self.dropped),
            "sentences left": len(self.kept),
            "supporting titles": len(before.supporting_titles),
            "supporting titles left": len(after.supporting_titles),
            "supporting sentences": len(before.supporting_sentences),
            "supporting sentences left": len(after.supporting_sentences),
            "answers": int(written),
            "answers left": int(written and _has_answer(after, before)),
        }


class ContextFilter(FromSettings, ABC):
    """Shortens a context before the model sees it. Subclasses are frozen dataclasses of simple values.

    The data set sets the tokenizer that counts tokens (:meth:`use`). Its cache key includes the filter's settings, code
    and :meth:`sources`.

    Attributes:
        asks: whether the result depends on the question, so that it cannot be reused for other questions.
        needs_whole: whether questions whose unfiltered prompts do not fit are left out.
    """

    kind: ClassVar[str] = "filters"
    asks: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False
    _definition: ClassVar[str]
    _tokenizer: ClassVar[PreTrainedTokenizerBase | None] = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._definition = fingerprint.of_code(cls)

    @abstractmethod
    def shorten(self, record: QARecord, prompt: Prompt) -> Sequence[str]:
        """Return what is left of each passage's text; "" for a removed passage."""

    def apply(self, record: QARecord, prompt: Prompt = PROMPT) -> QARecord:
        """Shorten a record's context; ``prompt`` is the prompt that the model will get.

        Raises:
            UserError: the filter needs a question and the record has none, or no tokenizer accepts a text.
        """
        return self.filtered(record, prompt).record

    def filtered(self, record: QARecord, prompt: Prompt = PROMPT) -> Filtered:
        """Like :meth:`apply`, but also returns what the record lost."""
        if self.asks and not record.question.strip():
            reason = f"ranks by the question, but record {record.id!r} has none"
            raise UserError("filter", type(self).__name__, reason=reason, hint="use another filter, such as Truncate")
        left, sentences, whole = self.parted(record, prompt)
        passages = tuple(with_texts(record.passages, left))
        titles = {passage.title for passage in passages}
        shorter = replace(
            record,
            passages=passages,
            supporting_titles=tuple(title for title in record.supporting_titles if title in titles),
            supporting_sentences=tuple(each for each in record.supporting_sentences if is_in(each, passages)),
        )
        both = list(zip(sentences, whole, strict=True))
        return Filtered(
            record=shorter,
            source=record,
            kept=tuple(sentence for sentence, stays in both if stays),
            dropped=tuple(sentence for sentence, stays in both if not stays),
            tokens=self.count(record.passages, prompt),
            tokens_left=self.count(passages, prompt),
        )

    def parted(self, record: QARecord, prompt: Prompt) -> tuple[Sequence[str], Sequence[Sentence], Sequence[bool]]:
        """What is left of each passage, the sentences of the context, and which of them are still whole."""
        left, sentences = self.shorten(record, prompt), sentences_of(record.passages)
        return left, sentences, whole_sentences(sentences, left)

    def count(self, passages: Sequence[Passage], prompt: Prompt) -> int:
        """Tokens of the passages in the prompt, without the text around them."""
        return _count(self.tokenizer, prompt.between.join(prompt.shown(passages)))

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the tokenizer that counts tokens."""
        object.__setattr__(self, "_tokenizer", tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that counts tokens."""
        if self._tokenizer is None:
            raise RuntimeError("no tokenizer is set: call use(tokenizer) first")
        return self._tokenizer

    def sources(self) -> dict[str, str]:
        """Further inputs of the cache key: size and SHA-256 of every file that a setting names."""
        return fingerprint.of_files(self.to_dict()["init_args"])

    @property
    def key(self) -> dict[str, object]:
        """The filter's settings and code, for the key of a cache."""
        return self.to_dict() | {"code": fingerprint.definitions(type(self))}


@dataclass(frozen=True)
class Budgeted(ContextFilter):
    """A filter with a token budget for the context, which includes titles and separators between passages.

    Args:
        kept: maximum share of the tokens that is kept, rounded down.
        tokens: maximum number of tokens, in place of a share. Shorter contexts stay unchanged.
        of: what the budget applies to: the context, or the whole prompt. With "prompt", questions whose unfiltered
            prompts do not fit are left out, so the questions are the same as without a filter.
    """

    kept: float = 0.25
    tokens: int | None = None
    of: Literal["context", "prompt"] = field(default="context", kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        share = is_weight(self.kept) and 0 < self.kept <= 1
        check_setting("kept", self.kept, share, "a number above 0 and at most 1")
        count = self.tokens is None or (is_integer(self.tokens) and self.tokens >= 1)
        check_setting("tokens", self.tokens, count, "an integer >= 1, or null for the share kept")
        check_setting("of", self.of, self.of in ("context", "prompt"), "context or prompt")

    @property
    def needs_whole(self) -> bool:  # type: ignore[override]
        """Whether the budget is a part of the unfiltered prompt, which must then fit."""
        return self.of == "prompt"

    def budget(self, tokens: int, record: QARecord, prompt: Prompt) -> int:
        """The budget for a record's context, which has ``tokens`` tokens."""
        around = self._around(record, prompt) if self.of == "prompt" else 0
        # The small term corrects rounding: .29 * 100 is 28.999….
        most = int(self.kept * (tokens + around) + 1e-9) if self.tokens is None else self.tokens
        return max(min(most - around, tokens), 0)

    def _around(self, record: QARecord, prompt: Prompt) -> int:
        """Tokens of a record's prompt outside of its context."""
        return prompt_tokens(record, self.tokenizer, prompt) - self.count(record.passages, prompt)

    def title_tokens(self, passages: Sequence[Passage], prompt: Prompt) -> list[int]:
        """Tokens that each passage takes in addition to its text: its title and the separator before it."""
        shown = prompt.shown(with_texts(passages, [_TEXT] * len(passages)))
        return token_counts(self.tokenizer, [prompt.between + text.removesuffix(_TEXT) for text in shown])


@functools.lru_cache(maxsize=4)
def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a text; a record's context is counted several times, which takes most of a filter's time."""
    return token_counts(tokenizer, [text])[0]


def with_texts(passages: Sequence[Passage], texts: Sequence[str]) -> list[Passage]:
    """Passages with new texts, without those that are blank; if no text changed, all passages are returned."""
    if list(texts) == [each.text for each in passages]:
        return list(passages)
    return [Passage(each.title, text) for each, text in zip(passages, texts, strict=True) if text.strip()]


def whole_sentences(sentences: Sequence[Sentence], left: Sequence[str]) -> list[bool]:
    """Which sentences are still whole in what is left of each passage; they are searched in order."""
    behind = [0] * len(left)
    whole = []
    for sentence in sentences:
        text = sentence.text.strip()
        place = left[sentence.passage].find(text, behind[sentence.passage]) if text else -1
        if place >= 0:
            behind[sentence.passage] = place + len(text)
        whole.append(place >= 0)
    return whole


def _has_answer(record: QARecord, source: QARecord) -> bool:
    """Whether the record's supporting passages (all passages if none are named) contain the answer.

    ``source`` names the supporting passages and the answers: one of them suffices, or all if ``match`` is "all".
    """
    matter = [
        each for each in record.passages if not source.supporting_titles or each.title in source.supporting_titles
    ]
    texts = [f"{passage.title}\n{passage.text}" for passage in matter]
    wanted = [[answer] for answer in source.answers] if source.match == "all" else [source.answers]
    return all(any(next(find_answers(text, each, (0, len(text))), None) for text in texts) for each in wanted)
