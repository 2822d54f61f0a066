"""Several examples in one sequence. T: tokens of all of them, N: predicting columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from lrsa_lit.data.collate import IGNORE_INDEX, TrainBatch, answer_labels, predicting_columns, token_ids
from lrsa_lit.data.prompts import Example


def collate_packed(examples: Sequence[Example]) -> TrainBatch:
    """One row (1, T) of all examples, one after the other, without padding.

    ``boundaries`` tells the attention where each starts, ``position_ids`` count from 0 in each, and no example's first
    token is learnt, as it would be predicted from the example before it.
    """
    sequences = [token_ids(example) for example in examples]
    lengths = [len(ids) for ids in sequences]
    row = torch.cat(sequences)[None]
    answers = [answer_labels(ids, example["prompt_length"]) for ids, example in zip(sequences, examples, strict=True)]
    labels = torch.cat([_after_first(labels) for labels in answers])[None]
    return TrainBatch(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        labels=labels,
        label_columns=predicting_columns(labels),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        boundaries=[0, *accumulate(lengths)],
        id=[example["id"] for example in examples],
    )


def _after_first(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels.new_full((1,), IGNORE_INDEX), labels[1:]])
