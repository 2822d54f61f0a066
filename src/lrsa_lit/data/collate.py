"""Collation of examples into batches.

B: batch size; T: length of the longest example or, if packed, tokens of all examples; Tp: length of the longest prompt;
N: number of predicting columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from lrsa_lit.data.prompts import Example
from lrsa_lit.data.tokenization import Span
from lrsa_lit.evaluation.answer_scores import Match

IGNORE_INDEX = -100
"""Labels with this value are ignored, as in PyTorch's cross-entropy."""


class ExampleSize(NamedTuple):
    """Token counts of an example.

    Attributes:
        tokens: tokens of prompt and answer.
        answer: tokens of all learnt answers, without the example's first token, which no token precedes to predict it.
        rejected: tokens of the rejected answer; 0 if there is none.
        context: tokens of the context; None if the example does not mark its context.
    """

    tokens: int
    answer: int
    rejected: int = 0
    context: int | None = None

    @classmethod
    def of(cls, tokens: int, prompt_length: int) -> ExampleSize:
        """The size of an example that has ``tokens`` tokens, the first ``prompt_length`` of them its prompt."""
        return cls.learning(tokens, [(prompt_length, tokens)])

    @classmethod
    def learning(
        cls, tokens: int, spans: Sequence[Span], rejected: int = 0, context: Sequence[int] = ()
    ) -> ExampleSize:
        """The size of an example whose tokens at the positions [start, end) of ``spans`` are learnt.

        ``context`` is the span [start, end) of its context, or () if the example does not mark it.
        """
        known = context[1] - context[0] if context else None
        return cls(tokens, sum(end - max(start, 1) for start, end in spans), rejected, known)

    @property
    def sequences(self) -> list[int]:
        """Lengths of the sequences that the model reads: the example, and any prompt with the rejected answer."""
        return [self.tokens, self.tokens - self.answer + self.rejected] if self.rejected else [self.tokens]


class TrainBatch(TypedDict):
    """A training batch.

    The examples come first. Rejected answers follow, each after its prompt, as further rows without labels or, if
    packed, as further sequences. All lists cover only the examples.

    Attributes:
        input_ids: (B, T) int64, prompt and answer, padded on the right.
        attention_mask: (B, T) int64, 1 on tokens and 0 on padding.
        labels: (B, T) int64, ``input_ids`` on learnt tokens and -100 elsewhere; not shifted, as in Hugging Face models.
        label_columns: (N,) int64, ascending: the columns j where some row has a label at j + 1. Only these need logits.
        position_ids: (1, T) int64, counting from 0 in each example of a packed row; None if not packed.
        boundaries: starts of the examples in a packed row, then its length: [0, n1, n1 + n2, …, T]; None if not packed.
            They are Python integers, so reading them needs no synchronisation with the device.
        id: the records' ids, in the order of the rows or, if packed, of the sequences.
        sizes: sizes of the examples, in the same order.
        learnt: positions [start, end) of each example's tokens that have a label. If missing, the last tokens have
            labels, as many as ``sizes`` says.
        rejected: positions [start, end) of each example's rejected answer in the flattened rows (B T); None for an
            example without one. Missing if no example has one.
        contexts: positions [start, end) of each example's context; () if the example does not mark it.
        position: position of each example in its split, in the same order.
        step_sizes: sizes of all examples, on all devices, of the optimizer step that the batch belongs to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    label_columns: Tensor
    position_ids: Tensor | None
    boundaries: list[int] | None
    id: list[str]
    sizes: list[ExampleSize]
    learnt: NotRequired[list[list[Span]]]
    rejected: NotRequired[list[Span | None]]
    contexts: NotRequired[list[Span | tuple[()]]]
    position: list[int]
    step_sizes: list[ExampleSize]


class Batch(TrainBatch):
    """A batch for validation, test or prediction: never packed, with the fields that generation needs.

    Attributes:
        prompt_ids: (B, Tp) int64, only the prompt, padded on the left for generation.
        prompt_mask: (B, Tp) int64, 1 on tokens and 0 on padding.
        prompt_length: prompt tokens of each example.
        context_length: prompt tokens up to the end of the last passage.
        first_turn: prompt tokens before the first answer of a conversation; equal to ``prompt_length`` without earlier
            turns.
        source_length: tokens that each prompt would have without a filter.
        gold_spans: positions [start, end) in ``input_ids`` of each example's supporting passages.
        answer_spans: positions [start, end) in ``input_ids`` of the answers in those passages.
        answers: the records' reference answers.
        match: how each record's answers are matched.
        question: the records' questions; "" where nothing is asked.
        task: the records' tasks; "" for records without one.
        source: name of each record's data set in a mixture; "" outside a mixture.
        groups: parts of the evaluation that each row belongs to, named by :func:`groups_of`.
        repeated: whether a row only fills up this device's share, because another device already counts it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_length: list[int]
    context_length: list[int]
    first_turn: list[int]
    source_length: list[int]
    gold_spans: list[list[Span]]
    answer_spans: list[list[Span]]
    answers: list[tuple[str, ...]]
    match: list[Match]
    question: list[str]
    task: list[str]
    source: list[str]
    groups: list[list[str]]
    repeated: list[bool]


def collate_training(examples: Sequence[Example], pad_token_id: int, length: int = 0) -> TrainBatch:
    """Pad examples, at least one, into a training batch with at least ``length`` columns."""
    rejected = _rejected(examples)
    sequences, labels = _sequences(examples, rejected)
    batch = _padded(examples, sequences, labels, pad_token_id, length)
    width = batch["input_ids"].shape[1]
    return _rejecting(batch, examples, rejected, range(0, len(sequences) * width, width))


def _padded(
    examples: Sequence[Example], sequences: list[Tensor], of_each: list[Tensor], pad_token_id: int, length: int = 0
) -> TrainBatch:
    """A batch with one row per sequence; the examples' own sequences come first."""
    labels, sizes = _pad(of_each, IGNORE_INDEX, length=length), _sizes(examples)
    return TrainBatch(
        input_ids=_pad(sequences, pad_token_id, length=length),
        attention_mask=_pad(list(map(torch.ones_like, sequences)), 0, length=length),
        labels=labels,
        label_columns=_predicting_columns(labels),
        position_ids=None,
        boundaries=None,
        id=[example["id"] for example in examples],
        sizes=sizes,
        learnt=list(map(learnt_spans, examples)),
        contexts=list(map(context_of, examples)),
        position=_positions(examples),
        # The loader replaces it with the sizes of the whole step.
        step_sizes=sizes,
    )


def collate_packed(examples: Sequence[Example]) -> TrainBatch:
    """Concatenate training examples into one row (1, T) without padding.

    ``boundaries`` marks where each sequence starts, and ``position_ids`` count from 0 in each. The first token of a
    sequence has no label, because the previous sequence would predict it.
    """
    rejected, sizes = _rejected(examples), _sizes(examples)
    sequences, of_each = _sequences(examples, rejected)
    boundaries = [0, *accumulate(map(len, sequences))]
    row = torch.cat(sequences)[None]
    labels = torch.cat(of_each)[None]
    labels[0, boundaries[:-1]] = IGNORE_INDEX
    batch = TrainBatch(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        labels=labels,
        label_columns=_predicting_columns(labels),
        position_ids=torch.cat([torch.arange(len(ids)) for ids in sequences])[None],
        boundaries=boundaries,
        id=[example["id"] for example in examples],
        sizes=sizes,
        learnt=list(map(learnt_spans, examples)),
        position=_positions(examples),
        # The loader replaces it with the sizes of the whole step.
        step_sizes=sizes,
    )
    return _rejecting(batch, examples, rejected, boundaries)


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples, at least one, into an evaluation batch; rejected answers are left out."""
    training = _padded(examples, *_sequences(examples), pad_token_id)
    turns = [example.get("first_turn", example["prompt_length"]) for example in examples]
    prompts = [ids[: example["prompt_length"]] for ids, example in zip(training["input_ids"], examples, strict=True)]
    return Batch(
        **training,
        prompt_ids=_pad(prompts, pad_token_id, side="left"),
        prompt_mask=_pad(list(map(torch.ones_like, prompts)), 0, side="left"),
        prompt_length=[example["prompt_length"] for example in examples],
        context_length=[example.get("context_length", turn) for example, turn in zip(examples, turns, strict=True)],
        first_turn=turns,
        source_length=[example.get("source_length", example["prompt_length"]) for example in examples],
        gold_spans=[_spans(example["gold_spans"]) for example in examples],
        answer_spans=[_spans(example["answer_spans"]) for example in examples],
        answers=[tuple(example["answers"]) for example in examples],
        match=[example["match"] for example in examples],
        question=[example.get("question", "") for example in examples],
        task=[example.get("task", "") for example in examples],
        source=[example.get("source", "") for example in examples],
        groups=[groups_of(example.get("source", ""), example.get("task", "")) for example in examples],
        repeated=[example.get("repeated", False) for example in examples],
    )


def groups_of(source: str, task: str) -> list[str]:
    """The parts of an evaluation that an example belongs to: its data set in a mixture, and its task there.

    For example ``["needle", "needle/niah_single"]``. An empty source or task adds no part.
    """
    data_set = [source] if source else []
    return [*data_set, "/".join([*data_set, task])] if task else data_set


def targets(batch: TrainBatch) -> Tensor:
    """The labels (B, N) that the logits of a batch's predicting columns are compared with."""
    return batch["labels"][:, 1:][:, batch["label_columns"]]


def _predicting_columns(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]


def learnt_spans(example: Example) -> list[Span]:
    """Positions [start, end) of an example's tokens that have a loss: ``learnt``, or all tokens after the prompt."""
    return _spans(example.get("learnt", [(example["prompt_length"], len(example["input_ids"]))]))


def context_of(example: Example) -> Span | tuple[()]:
    """Positions [start, end) of an example's context; () if the example does not mark it."""
    span = example.get("context_span")
    return (span[0], span[1]) if span else ()


def _sizes(examples: Sequence[Example]) -> list[ExampleSize]:
    return [
        ExampleSize.learning(
            len(example["input_ids"]), learnt_spans(example), len(example.get("rejected", ())), context_of(example)
        )
        for example in examples
    ]


def _positions(examples: Sequence[Example]) -> list[int]:
    return [example.get("position", row) for row, example in enumerate(examples)]


def _sequences(examples: Sequence[Example], rejected: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens and labels of each example, followed by those of the rejected answers."""
    own = [_token_ids(example["input_ids"]) for example in examples]
    labels = [*map(_labels, examples, own), *(torch.full_like(ids, IGNORE_INDEX) for ids in rejected)]
    return [*own, *rejected], labels


def _rejected(examples: Sequence[Example]) -> list[Tensor]:
    """The prompt with the rejected answer, for each example that has one."""
    return [
        _token_ids([*example["input_ids"][: example["prompt_length"]], *example["rejected"]])
        for example in examples
        if example.get("rejected")
    ]


def _rejecting(
    batch: TrainBatch, examples: Sequence[Example], rejected: Sequence[Tensor], starts: Sequence[int]
) -> TrainBatch:
    """Add the positions of the rejected answers to a batch; ``starts`` are the starts of all its sequences."""
    if not rejected:
        return batch
    places = zip(starts[len(examples) :], rejected, strict=False)
    spans: list[Span | None] = []
    for example in examples:
        if not example.get("rejected"):
            spans.append(None)
            continue
        start, ids = next(places)
        spans.append((start + example["prompt_length"], start + len(ids)))
    return {**batch, "rejected": spans}


def _token_ids(ids: Sequence[int]) -> Tensor:
    # NumPy reads a list about twice as fast as PyTorch does.
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))


def _labels(example: Example, ids: Tensor) -> Tensor:
    labels = torch.full_like(ids, IGNORE_INDEX)
    for start, end in learnt_spans(example):
        labels[start:end] = ids[start:end]
    return labels


def _pad(sequences: list[Tensor], value: int, side: str = "right", length: int = 0) -> Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)
    return torch.nn.functional.pad(padded, (0, max(length - padded.shape[1], 0)), value=value)


def _spans(spans: Sequence[Span]) -> list[Span]:
    return [(start, end) for start, end in spans]
