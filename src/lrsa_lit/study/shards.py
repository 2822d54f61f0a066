"""Evaluations in pieces that any process can do: some of the questions, or a look at what is selected for them."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lrsa_lit.attention import LRSAConfig, base_of
from lrsa_lit.study import tokens
from lrsa_lit.study.evaluation import Answers, evaluate, survival
from lrsa_lit.study.plan import Row
from lrsa_lit.study.tokens import TokenFile
from lrsa_lit.study.training import task_of
from lrsa_lit.tasks import LongContextQA

Survival = dict[str, float | None] | None

BATCH = 8
"""Questions at a time for a loss. Pieces are cut at multiples of it, so that their losses are those of the whole."""

_LARGEST = 200
"""Most questions of a piece: it is lost when the time is over."""

_SURVIVAL = 16
"""Questions whose selections are looked at."""


class Weights(NamedTuple):
    """Where a model comes from.

    Attributes:
        row: how it was trained.
        path: its trained weights; None for the base LLM as it is.
        source: where the base LLM lies on this machine; None: where the row says.
    """

    row: Row
    path: Path | None
    source: str | None


@dataclass(frozen=True)
class Shard:
    """A piece of an evaluation.

    Attributes:
        weights: the model's.
        rule: the attention; None is dense.
        file: of the questions.
        questions: the positions [start, stop) in the file, for answers and losses in the order of the prompts' lengths,
            since prompts of one length are answered together.
        kind: losses alone, answers with their losses, or the survival of what the answers need.
        batch_size: questions at a time for a loss.
    """

    weights: Weights
    rule: LRSAConfig | None
    file: Path
    questions: tuple[int, int]
    kind: Literal["losses", "answers", "survival"]
    batch_size: int

    @property
    def work(self) -> tuple[Path, str]:
        """What takes about the same time for each question."""
        return self.file, self.kind

    @property
    def size(self) -> int:
        """Number of questions."""
        return self.questions[1] - self.questions[0]


class Outcome(NamedTuple):
    """What came out of a shard, or of all shards of an evaluation.

    Attributes:
        answers: in the order of the prompts' lengths.
        survival: as :func:`lrsa_lit.study.evaluation.survival` has it.
        layers: of the model.
        dtype: of its weights.
        seconds: that it took, loading the model included.
    """

    answers: Answers
    survival: Survival
    layers: int
    dtype: str
    seconds: float


def shards_of(
    weights: Weights, rule: LRSAConfig | None, file: Path, count: int, size: int, *, generates: bool, whole_text: bool
) -> list[Shard]:
    """The shards of an evaluation, in the order that :func:`joined` takes their outcomes in.

    Args:
        weights: the model's.
        rule: the attention; None is dense.
        file: of the questions.
        count: questions in it.
        size: questions of a shard; see :func:`shard_size`.
        generates: whether the questions are answered; else there are losses alone, and no survival.
        whole_text: whether most of a text is scored, so that a loss needs a logit for each word at most positions.
    """
    kind: Literal["losses", "answers"] = "answers" if generates else "losses"
    batch = 1 if whole_text else BATCH
    pieces = [
        Shard(weights, rule, file, (start, min(start + size, count)), kind, batch) for start in range(0, count, size)
    ]
    return [*pieces, Shard(weights, rule, file, (0, min(_SURVIVAL, count)), "survival", 1)] if generates else pieces


def shard_size(questions: int, workers: int) -> int:
    """Questions of a shard, such that all questions of a row keep all workers busy for about two rounds."""
    if not workers:
        return max(questions, 1)
    even = -(-questions // (2 * workers * BATCH)) * BATCH
    return min(max(even, BATCH), _LARGEST)


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of an evaluation, of those of its shards in their order."""
    lists = {
        name: list(itertools.chain.from_iterable(getattr(outcome.answers, name) for outcome in outcomes))
        for name in (field.name for field in fields(Answers))
    }
    *_, last = outcomes
    return last._replace(answers=Answers(**lists), seconds=sum(outcome.seconds for outcome in outcomes))


class Evaluator:
    """Evaluates shards in this process; the last model stays, as do the questions."""

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._task: LongContextQA | None = None
        self._files: dict[Path, TokenFile] = {}

    def __call__(self, shard: Shard) -> Outcome:
        """Do a shard."""
        began = time.monotonic()
        task, answers, kept = self._loaded(shard.weights), Answers(), None
        if shard.file not in self._files:
            self._files[shard.file] = tokens.read(shard.file)
        file, asked = self._files[shard.file], slice(*shard.questions)
        model: Any = task.model
        if shard.kind == "survival":
            kept = survival(model, task.tokenizer, file.examples[asked], shard.rule)
        else:
            examples = [file.examples[place] for place in file.by_length[asked]]
            length = task.max_new_tokens if shard.kind == "answers" else 0
            answers = evaluate(
                model, task.tokenizer, examples, shard.rule, max_new_tokens=length, batch_size=shard.batch_size
            )
        layers = model.config.get_text_config().num_hidden_layers
        dtype = str(model.dtype).removeprefix("torch.")
        return Outcome(answers, kept, layers, dtype, time.monotonic() - began)

    def _loaded(self, weights: Weights) -> LongContextQA:
        """The task of the row, its model ready to be evaluated."""
        if self._task is None or weights != self._weights:
            self._task = None
            self._task, self._weights = _load(weights), weights
        return self._task


def _load(weights: Weights) -> LongContextQA:
    """Load a model, on the device and in the dtype that the training computed in."""
    task = task_of(weights.row, weights.source)
    model: Any = task.backbone.build()
    if weights.path is not None:
        state = torch.load(weights.path, map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=task.strict_loading)
    model = base_of(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and str(weights.row.settings["trainer"].get("precision")).startswith("bf16"):
        # The weights alone: rotary frequencies in bfloat16 would destroy long positions.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    task.model = model.to(device).eval()
    return task


def release() -> None:
    """Give the GPU memory back that nothing needs any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
