"""Base class of every data set: turns records into cached examples, and examples into batches.

To add a data set, write a subclass with one method, :meth:`QADataModule.records`, and one YAML file. Store every
constructor parameter as an attribute of the same name. The key of the cache is made from these names and values, the
files that they name, the tokenizer, the code of the class's package and this project's data code.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import datasets
import lightning
from rich.progress import track
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lrsa_lit.bounds import check_counts, is_integer
from lrsa_lit.cache_contents import SOURCES
from lrsa_lit.data import fingerprint, kept_sources, token_cache
from lrsa_lit.data.collate import Batch, groups_of
from lrsa_lit.data.filters.context_filter import ContextFilter
from lrsa_lit.data.filters.filtered_examples import checked_filter, counted, encode_filtered, sources_of
from lrsa_lit.data.loaders import TrainerSettings, evaluation_loader, training_loader
from lrsa_lit.data.order import Order, Shuffled
from lrsa_lit.data.plan import EpochPlan, Stage, check_lengths, check_stages
from lrsa_lit.data.policies import Packed, checked_policy
from lrsa_lit.data.prompts import PROMPT, Example, Prompt, TooLong, encode
from lrsa_lit.data.records import QARecord, Record
from lrsa_lit.data.sampler import ResumableLoader
from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.errors import UserError
from lrsa_lit.paths import cache_dir
from lrsa_lit.run_labels import TOO_LONG_OF
from lrsa_lit.terminal import PlainConsole

Split: TypeAlias = Literal["train", "val", "test"]
Score: TypeAlias = Literal["f1", "recall", "em", "loss"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_log = logging.getLogger("lrsa_lit.data")
_STAGES: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["test"]}
# These settings decide how examples are batched, not which examples there are.
BATCHED = {"batch_size", "eval_batch_size", "num_workers", "packing", "group_by_length", "curriculum", "pad_to_longest"}


class QADataModule(lightning.LightningDataModule):
    """Question answering over long contexts.

    Args:
        tokenizer: the model's tokenizer; the command line sets it.
        max_tokens: maximum tokens of one example, prompt and answer together. Longer examples are left out.
        batch_size: examples per training batch on each device.
        eval_batch_size: examples per validation, test or prediction batch on each device.
        num_workers: processes that load batches; 0 loads them in the main process.
        seed: seed of the splits and contexts. The run's own seed decides the order of training.
        limit: maximum number of examples per split, for example {train: 64, val: 16}.
        packing: pack several training examples into one sequence of at most this many tokens, for example
            {tokens: 32768}. Packed examples do not attend to each other. Requires batch_size 1.
        group_by_length: put training examples of similar lengths into the same batch, which reduces padding.
        curriculum: train on shorter examples first, for example [{max_tokens: 2048, until_step: 200},
            {max_tokens: 4096}].
        pad_to_longest: pad every training batch to the length of the longest example, rounded up to a multiple of 64
            tokens. With model.backbone.compile_layers, the model is then compiled once instead of once per length.
        filter: shortens contexts before the model sees them. Data sets that fill contexts up to max_tokens fill them
            first.

    Attributes:
        score: the data set's published metric: ``f1`` (LongBench's ``qa_f1``), ``recall`` (RULER's) or ``em`` (exact
            match). ``loss``, also shown as perplexity, if the data set asks no questions, so no answers are generated.
        noun: what messages call an example, such as "question".
        rejects: whether each example also has a rejected answer.
        filterable: whether the records are questions about passages.
        padding: share of tokens that is padding in the first epoch's training batches; with packing, the share of the
            token budget that is unused. None until the training loader exists.
        report: counts per split: records ``kept``; records left out as ``too_long``, also per task
            (``too_long of TASK``); the smallest number of tokens that a left-out record needs (``shortest_too_long``);
            and counts that a data set adds.

    Raises:
        UserError: a parameter is out of range.
    """

    score: ClassVar[Score] = "f1"
    noun: ClassVar[str] = "question"
    rejects: ClassVar[bool] = False
    filterable: ClassVar[bool] = True
    _definition: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._definition = fingerprint.of_code(cls)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int = 1024,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        limit: dict[str, int] | None = None,
        packing: Packed | None = None,
        group_by_length: bool = False,
        curriculum: list[Stage] | None = None,
        pad_to_longest: bool = False,
        filter: ContextFilter | None = None,  # noqa: A002 - what settings call it
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
        self.packing = packing
        self.group_by_length = group_by_length
        self.curriculum = curriculum or []
        self.pad_to_longest = pad_to_longest
        self.policy = checked_policy(batch_size, packing, group_by_length, pad_to_longest)
        check_stages(self.curriculum)
        self.filter = checked_filter(filter, type(self).__name__, self.filterable)
        self.padding: float | None = None
        self.report: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[Split, datasets.Dataset] = {}

    def records(self, split: Split) -> Iterable[Record]:
        """The records of a split in their final order; iteration stops once ``limit`` examples are kept."""
        raise NotImplementedError(f"{type(self).__name__} must define records(split)")

    def to_example(self, record: Any) -> Example | TooLong:
        """Turn a record, by default a :class:`QARecord`, into an example.

        Override this to fill contexts up to ``max_tokens``, or if records have another type. For questions, return the
        result of :meth:`encode`.
        """
        return self.encode(record)

    def encode(
        self, record: QARecord, whole: Example | TooLong | None = None, prompt: Prompt = PROMPT
    ) -> Example | TooLong:
        """Tokenise a record with a prompt, its context filtered; ``whole`` is the unfiltered example, if known."""
        if self.filter is None or isinstance(whole, TooLong):
            return encode(record, self.checked_tokenizer, self.max_tokens, prompt) if whole is None else whole
        return encode_filtered(self.filter, record, whole, self.checked_tokenizer, self.max_tokens, prompt)

    def sources(self) -> dict[str, str]:
        """Further inputs of the cache key: size and SHA-256 of every file that a parameter names."""
        return fingerprint.of_files(self._parameters())

    def splits(self) -> tuple[Split, ...]:
        """The splits that this data set has."""
        return SPLITS

    def groups(self, split: Split) -> list[str]:
        """Names of the parts of an open split that are scored separately; empty if there is only one part.

        Parts are the data sets of a mixture and the tasks of a data set, named by :func:`groups_of`.
        """
        if split not in self._examples:
            return []
        examples = self._examples[split]
        sources = examples["source"] if "source" in examples.column_names else [""] * len(examples)
        found = dict.fromkeys(zip(sources, examples["task"], strict=True))
        names = dict.fromkeys(name for source, task in found for name in groups_of(source, task))
        # A data set with a single task, or a mixture of a single data set, would repeat the score of its only part.
        siblings = Counter(name.rpartition("/")[0] for name in names)
        return [name for name in names if siblings[name.rpartition("/")[0]] > 1]

    def facts(self, split: Split) -> dict[str, SplitFacts]:
        """Facts that identify the questions of an open split, by data set of a mixture; otherwise under the key ""."""
        # A mixture concatenates the examples of its data sets.
        parts = itertools.groupby(self._opened(split), key=lambda example: example.get("source", ""))
        return {source: SplitFacts.of(part) for source, part in parts}

    def check_answers(self, command: str) -> None:
        """Raise a UserError if a command would generate answers for a data set that has no reference answers."""
        if self.score == "loss":
            reason = f"is not possible with {type(self).__name__}, which asks no questions"
            if command == "predict":
                raise UserError("predict", reason=reason)
            raise UserError("generate_answers", True, "false", reason=reason)

    def score_of(self, group: str) -> Score:
        """The published metric of a group; the group "" is the whole evaluation."""
        return self.score

    def unanswerable(self, split: Split, new_tokens: int) -> int:
        """Count the answers of an open split that are longer than ``new_tokens``, not counting the end token."""
        examples = self._opened(split)
        lengths = zip(token_cache.lengths(examples), examples["prompt_length"], strict=True)
        return sum(length - prompt - 1 > new_tokens for length, prompt in lengths)

    @cached_property
    def fingerprint(self) -> str:
        """Identifier of the examples: equal for equal code, parameters, filter, sources and tokenizer."""
        parts = {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "code": fingerprint.definitions(type(self)),
            "parameters": self._parameters(),
            "filter": self.filter and self.filter.key,
            "tokenizer": fingerprint.of_tokenizer(self.checked_tokenizer),
        }
        name = type(self).__name__
        self._sources_file = cache_dir("data", f"{name}-{fingerprint.digest(parts)}{SOURCES}")
        sources = kept_sources.with_absent(self._sources_file, self.sources() | sources_of(self.filter))
        return f"{name}-{fingerprint.digest({**parts, 'sources': sources})}"

    @property
    def training_fingerprint(self) -> str:
        """Identifier of the training split's examples and their order."""
        return self.fingerprint

    @property
    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, checked to be fast and to have a chat template and an end-of-sequence token."""
        if (tokenizer := self.tokenizer) is None:
            raise UserError("tokenizer", reason="is not set", allowed="the model's")
        for name, value in (
            ("backend_tokenizer (it is not a fast tokenizer)", getattr(tokenizer, "backend_tokenizer", None)),
            ("chat_template", tokenizer.chat_template),
            ("eos_token", tokenizer.eos_token),
        ):
            if not value:
                raise UserError("tokenizer", tokenizer.name_or_path or "the tokenizer", reason=f"has no {name}")
        return tokenizer

    def prepare_data(self, stage: str | None = None) -> None:
        """Tokenise and cache the splits of a stage: by default the trainer's stage, or all splits without a trainer."""
        running = self.trainer.state.fn if self.trainer else None
        for split in self._needed(stage or (running.value if running else None)):
            self.prepare_split(split)
            if split == "train":
                self._training_lengths(self.open_split(split))

    def folder(self, split: Split) -> Path:
        """The folder of a tokenised split."""
        return cache_dir("data", self.fingerprint, split)

    def prepare_split(self, split: Split) -> None:
        """Tokenise and cache a split, unless it is cached already."""
        folder = self.folder(split)
        if token_cache.is_built(folder):
            return
        self.report[split].clear()
        token_cache.remove_abandoned(cache_dir("data"))
        token_cache.build(folder, self._build(split), self.report[split])
        if fingerprint.is_of_files(type(self), type(self.filter)):
            with token_cache.writable(self._sources_file):
                kept_sources.keep(self._sources_file, self.sources() | sources_of(self.filter))
        else:
            token_cache.forget_at_exit(folder)
            unseen = "%s is not defined in a file, so code changes cannot be detected: each process tokenises it anew"
            _log.warning(unseen, type(self).__name__)

    def setup(self, stage: str | None = None) -> None:
        """Open the cached splits of a stage ("fit", "validate", "test", "predict"), or all of them."""
        for split in self._needed(stage):
            if split not in self._examples:
                self._examples[split] = self.open_split(split)
                counts = ", ".join(f"{name} {count}" for name, count in sorted(self.report[split].items()))
                _log.info("%s %s (at most %d tokens): %s", type(self).__name__, split, self.max_tokens, counts)

    def open_split(self, split: Split) -> datasets.Dataset:
        """The examples of a cached split; this also loads the split's ``report``."""
        examples, self.report[split] = token_cache.load(self.folder(split))
        return examples

    def train_dataloader(self) -> ResumableLoader:
        """This rank's training batches, in an order decided by the run's seed (``seed`` decides the examples).

        The loader's ``state_dict`` holds its position; ``load_state_dict`` resumes there, even in mid-epoch.
        """
        examples, settings = self._opened("train"), TrainerSettings.of(self.trainer)
        lengths, order = self._training_lengths(examples), self.order(len(examples))
        plan = EpochPlan(lengths, self.policy, order, settings.ranks, self.curriculum, settings.batches_a_step)
        loader = training_loader(examples, plan, settings, self._pad_token_id, self.num_workers)
        self.padding = plan.padding(loader.batch_sampler.seed, epoch=0)
        if settings.rank == 0:
            what = "of the budget unused" if self.packing else "padding"
            told = type(self).__name__, len(plan), 100 * self.padding, what
            _log.info("%s train: %d batches an epoch, %.1f %% %s", *told)
        return loader

    def order(self, examples: int) -> Order:
        """The order of the training examples."""
        return Shuffled(examples)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Validation batches in a fixed order; an empty list if there is no validation split."""
        return self._evaluation_loader("val") if "val" in self.splits() else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches in a fixed order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test batches."""
        return self.test_dataloader()

    def exclude(self, split: Split, example: TooLong, records: int = 1, task: str = "") -> None:
        """Count records that are left out because they do not fit; also by task, if there is one."""
        report = self.report[split]
        report["too_long"] += records
        if task:
            report[f"{TOO_LONG_OF}{task}"] += records
        report["shortest_too_long"] = min(report["shortest_too_long"] or example.tokens, example.tokens)

    def _build(self, split: Split) -> Iterator[Example]:
        records, limit, console = self.records(split), self.limit.get(split), PlainConsole(stderr=True)
        total = min(limit or len(records), len(records)) if isinstance(records, Sized) else limit
        kept, title, hidden = self._kept(split, records, limit), f"Tokenising {split}", not console.is_terminal
        if self.filter is not None:
            kept = counted(kept, self.filter, split, self.report[split])
        yield from track(kept, title, total=total, console=console, transient=True, disable=hidden)
        if not self.report[split]["kept"]:
            raise self._empty(split)

    def _kept(self, split: Split, records: Iterable[Record], limit: int | None) -> Iterator[Example]:
        seen: set[str] = set()
        for number, record in enumerate(records, start=1):
            try:
                record.check_texts()
            except UserError as error:
                raise UserError(*self._origin(split), reason=f"has a bad {split} record {number} ({error})") from None
            if record.id in seen:
                raise UserError(*self._origin(split), reason=f"has the id {record.id!r} twice in the split {split!r}")
            seen.add(record.id)
            example = self.to_example(record)
            if isinstance(example, TooLong):
                self.exclude(split, example, task=record.task)
                continue
            self.report[split]["kept"] += 1
            yield example
            if self.report[split]["kept"] == limit:
                return

    def _empty(self, split: Split) -> UserError:
        """The error for a split without any example."""
        report = self.report[split]
        if not report["too_long"]:
            return UserError(*self._origin(split), reason=f"has no records for the split {split!r}; it needs one")
        reason = f"leaves the split {split!r} empty, as each of its {report['too_long']} {self.noun}s needs more"
        return UserError("max_tokens", self.max_tokens, f"{report['shortest_too_long']} or more", reason=reason)

    def _origin(self, split: Split) -> tuple[str, object]:
        """The argument that a split comes from, and its value, for errors."""
        return type(self).__name__, None

    def _needed(self, stage: str | None) -> tuple[Split, ...]:
        needed = _STAGES.get(stage or "", SPLITS)
        present = self.splits()
        missing = [split for split in needed if split not in present]
        # Training works without a validation split, and a call without a stage uses the splits that exist.
        if stage and missing and (stage, missing) != ("fit", ["val"]):
            raise UserError(missing[0], reason=f"is not set, but {stage} needs this split")
        return tuple(split for split in needed if split in present)

    def _opened(self, split: Split) -> datasets.Dataset:
        if split not in self._examples:
            raise RuntimeError(f"the {split} split is not open: call prepare_data() and setup() first")
        return self._examples[split]

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self.checked_tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def _evaluation_loader(self, split: Split) -> DataLoader[Batch]:
        settings, pad_token_id = TrainerSettings.of(self.trainer), self._pad_token_id
        return evaluation_loader(self._opened(split), self.eval_batch_size, settings, pad_token_id, self.num_workers)

    def _training_lengths(self, examples: datasets.Dataset) -> list[int]:
        """Tokens of each example, checked against packing and curriculum."""
        lengths = token_cache.longest(examples)
        self.policy.check(lengths)
        check_lengths(self.curriculum, lengths)
        return lengths

    def _parameters(self) -> dict[str, object]:
        """Every constructor parameter of the class and its bases that decides the records."""
        return fingerprint.parameters(self, QADataModule, but={*BATCHED, "tokenizer", "filter"})


def at_least(name: str, value: int, least: int) -> int:
    """Return the value of a parameter; raise a UserError if it is not an integer >= ``least``."""
    if not is_integer(value) or value < least:
        raise UserError(name, value, f"{least} or more")
    return value
