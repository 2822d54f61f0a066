"""The base of filters: a record becomes one with a shorter context, and what it lost is accounted for."""

from __future__ import annotations

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
    """A record whose context is shorter, and what has become of each sentence.

    Attributes:
        record: with what is left. A passage of which nothing is left is gone, and so is its title, from
            ``supporting_titles`` too; ``supporting_sentences`` are those that are whole.
        source: the record as it was.
        kept: the sentences of the source that are whole in the record, in their order.
        dropped: all its others, which are cut, rewritten or gone, in their order.
        tokens: of the source's context, as the prompt shows it.
        tokens_left: of the record's.
    """

    record: QARecord
    source: QARecord
    kept: tuple[Sentence, ...]
    dropped: tuple[Sentence, ...]
    tokens: int
    tokens_left: int

    @property
    def context(self) -> str:
        """Names the whole context, which other questions may be asked about: 12 hex digits."""
        return hashlib.sha256(repr(self.source.passages).encode()).hexdigest()[:12]

    def counts(self) -> dict[str, int]:
        """What a data set adds up over its questions: of each measure all there was, and what is left.

        An answer survives where it is written out in what is left of the supporting passages, of all passages where
        none are named; one of alternatives is enough. Questions whose answer never was there, as yes and no, do not
        count.
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
    """Makes a context shorter before the model sees it. Subclasses are frozen dataclasses of simple values.

    A data set hands over the tokenizer that tokens are counted with (:meth:`use`); settings, code and
    :meth:`sources` are in the key of its cache.

    Attributes:
        asks: whether what is left depends on the question, so that no other question can be asked about it.
        needs_whole: whether questions whose prompts do not fit without the filter are left out with it, too.
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
        """What is left of the text of each passage; "" where nothing is."""

    def apply(self, record: QARecord, prompt: Prompt = PROMPT) -> QARecord:
        """The record with a shorter context; ``prompt`` is how the model will be shown it.

        Raises:
            UserError: the record has no question and the filter asks for one, or a text that no tokenizer takes.
        """
        return self.filtered(record, prompt).record

    def filtered(self, record: QARecord, prompt: Prompt = PROMPT) -> Filtered:
        """The same, with what it lost."""
        if self.asks and not record.question.strip():
            reason = f"ranks by the question, and record {record.id!r} has none"
            raise UserError("filter", type(self).__name__, reason=reason, hint="use one that does not, as Truncate")
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
        """What is left of each passage, the sentences of the context, and which of them are whole."""
        left, sentences = self.shorten(record, prompt), sentences_of(record.passages)
        return left, sentences, whole_sentences(sentences, left)

    def count(self, passages: Sequence[Passage], prompt: Prompt) -> int:
        """Tokens of passages as the prompt shows them, without what stands around them."""
        return token_counts(self.tokenizer, [prompt.between.join(prompt.shown(passages))])[0]

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Count tokens with it from now on."""
        object.__setattr__(self, "_tokenizer", tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that counts tokens."""
        if self._tokenizer is None:
            raise RuntimeError("no tokenizer counts the tokens: call use(tokenizer) first")
        return self._tokenizer

    def sources(self) -> dict[str, str]:
        """What else decides what is left: size and SHA-256 of every file that a setting names."""
        return fingerprint.of_files(self.to_dict()["init_args"])

    @property
    def key(self) -> dict[str, object]:
        """Settings and code, for the key of a cache."""
        return self.to_dict() | {"code": fingerprint.definitions(type(self))}


@dataclass(frozen=True)
class Budgeted(ContextFilter):
    """A filter that keeps at most so many tokens of a context, titles and what stands between passages among them.

    Args:
        kept: the share of the context's tokens that may stay, rounded down.
        tokens: so many instead of a share; a context that has no more is left as it is.
        of: what they are a share of, and count: the context, or the prompt with all that stands around the context.
            Then the prompt must fit without the filter, too, so that the questions are those of the unfiltered data.
    """

    kept: float = 0.25
    tokens: int | None = None
    of: Literal["context", "prompt"] = field(default="context", kw_only=True)

    def __post_init__(self) -> None:
        """Check each bound once."""
        share = is_weight(self.kept) and 0 < self.kept <= 1
        check_setting("kept", self.kept, share, "a number above 0 and at most 1")
        count = self.tokens is None or (is_integer(self.tokens) and self.tokens >= 1)
        check_setting("tokens", self.tokens, count, "an integer >= 1, or null for the share kept")
        check_setting("of", self.of, self.of in ("context", "prompt"), "context or prompt")

    @property
    def needs_whole(self) -> bool:  # type: ignore[override]
        """Whether it is measured by prompts, which must be there to be measured."""
        return self.of == "prompt"

    def budget(self, tokens: int, record: QARecord, prompt: Prompt) -> int:
        """How many may stay of a record's context, which has so many tokens."""
        around = self._around(record, prompt) if self.of == "prompt" else 0
        # A product such as .29 * 100 is 28.999….
        most = int(self.kept * (tokens + around) + 1e-9) if self.tokens is None else self.tokens
        return max(min(most - around, tokens), 0)

    def _around(self, record: QARecord, prompt: Prompt) -> int:
        """Tokens of a record's prompt beside those of its context."""
        return prompt_tokens(record, self.tokenizer, prompt) - self.count(record.passages, prompt)

    def title_tokens(self, passages: Sequence[Passage], prompt: Prompt) -> list[int]:
        """The tokens that each passage takes beside its text, what stands before it included."""
        shown = prompt.shown(with_texts(passages, [_TEXT] * len(passages)))
        return token_counts(self.tokenizer, [prompt.between + text.removesuffix(_TEXT) for text in shown])


def with_texts(passages: Sequence[Passage], texts: Sequence[str]) -> list[Passage]:
    """Passages with other texts, without those of which nothing is left; all of them where no text is another."""
    if list(texts) == [each.text for each in passages]:
        return list(passages)
    return [Passage(each.title, text) for each, text in zip(passages, texts, strict=True) if text.strip()]


def whole_sentences(sentences: Sequence[Sentence], left: Sequence[str]) -> list[bool]:
    """Which sentences are whole in what is left of each passage, found one behind the other."""
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
    """Whether what is left of the passages that matter to a source has an answer, all of them where all are needed."""
    matter = [
        each for each in record.passages if not source.supporting_titles or each.title in source.supporting_titles
    ]
    texts = [f"{passage.title}\n{passage.text}" for passage in matter]
    wanted = [[answer] for answer in source.answers] if source.match == "all" else [source.answers]
    return all(any(next(find_answers(text, each, (0, len(text))), None) for text in texts) for each in wanted)
