"""From examples to a batch. B: batch, T: longest example of the batch, Tp: longest prompt of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from lrsa_lit.data.prompts import Example, Span
from lrsa_lit.metrics import Match

IGNORE_INDEX = -100


class TrainBatch(TypedDict):
    """What training needs of a batch.

    Attributes:
        input_ids: (B, T) int64, prompt and answer, padded on the right.
        attention_mask: (B, T) int64, 1 on tokens and 0 on padding.
        labels: (B, T) int64, ``input_ids`` on answer tokens and -100 elsewhere; not shifted, as Hugging Face has it.
        label_columns: (N,) int64, the columns of which the next one is a label in some row.
        position_ids: (B, T) int64 that restart with each sequence; None where each row is one.
        boundaries: where the sequences packed in the one row start and end, 0 … T; None where each row is one.
        id: the records' ids.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    label_columns: Tensor
    position_ids: Tensor | None
    boundaries: list[int] | None
    id: list[str]


class Batch(TrainBatch):
    """What a data loader yields.

    Attributes:
        prompt_ids: (B, Tp) int64, the prompt alone, padded on the left for generation.
        prompt_mask: (B, Tp) int64, 1 on tokens and 0 on padding.
        prompt_length: prompt tokens of each example.
        gold_spans: positions [start, end) in ``input_ids`` of each example's supporting passages.
        answer_spans: positions [start, end) in ``input_ids`` of the answers within those passages.
        answers: the records' reference answers.
        match: how each record's answers are matched.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_length: list[int]
    gold_spans: list[list[Span]]
    answer_spans: list[list[Span]]
    answers: list[tuple[str, ...]]
    match: list[Match]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples, at least one, into a batch."""
    lengths = [example["prompt_length"] for example in examples]
    sequences = [torch.as_tensor(example["input_ids"], dtype=torch.int64) for example in examples]
    prompts = [ids[:length] for ids, length in zip(sequences, lengths, strict=True)]
    labels = [ids.index_fill(0, torch.arange(n), IGNORE_INDEX) for ids, n in zip(sequences, lengths, strict=True)]
    padded_labels = _pad(labels, IGNORE_INDEX)
    return Batch(
        input_ids=_pad(sequences, pad_token_id),
        attention_mask=_pad([torch.ones_like(ids) for ids in sequences], 0),
        labels=padded_labels,
        label_columns=(padded_labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()[:, 0],
        position_ids=None,
        boundaries=None,
        prompt_ids=_pad(prompts, pad_token_id, side="left"),
        prompt_mask=_pad([torch.ones_like(ids) for ids in prompts], 0, side="left"),
        prompt_length=lengths,
        gold_spans=[_spans(example["gold_spans"]) for example in examples],
        answer_spans=[_spans(example["answer_spans"]) for example in examples],
        id=[example["id"] for example in examples],
        answers=[tuple(example["answers"]) for example in examples],
        match=[example["match"] for example in examples],
    )


def _pad(sequences: list[Tensor], value: int, side: str = "right") -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)


def _spans(spans: Sequence[Span]) -> list[Span]:
    return [(start, end) for start, end in spans]
