"""Batches in which vectors replace tokens. They are built from host data, so training does not wait for the device.

Dimensions: B rows, N chunks, n tokens of the longest chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrsa_lit.attention.decoding.turns import left_padded
from lrsa_lit.data.collate import IGNORE_INDEX, ExampleSize, TrainBatch
from lrsa_lit.data.tokenization import Span

AnyBatch = TypeVar("AnyBatch", bound=TrainBatch)


@dataclass(frozen=True)
class Row:
    """A rewritten row of a batch.

    Attributes:
        parts: the row's parts in order: a range of columns of the original row, or new token ids.
        learnt: positions [start, end) that have a loss.
        prompt: number of tokens before the answer.
    """

    parts: Sequence[range | list[int]]
    learnt: list[Span]
    prompt: int

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(map(len, self.parts))


def rewritten(batch: AnyBatch, rows: Sequence[Row], step_sizes: list[ExampleSize]) -> AnyBatch:
    """The batch with rewritten rows, padded on the right; prompts, if it has any, are padded on the left.

    Args:
        batch: a batch of the loader.
        rows: a rewritten row for each of its rows.
        step_sizes: the sizes of all examples of the optimizer step.
    """
    ids = batch["input_ids"]
    sizes = [ExampleSize.learning(row.tokens, row.learnt) for row in rows]
    columns, given, labelled, real = (_padded([part(row) for row in rows], ids) for part in
                                      (_columns, _given, _labelled, _real))  # fmt: skip
    taken = ids.gather(1, columns.clamp(min=0))
    input_ids = torch.where(columns < 0, given, taken)
    predicting = sorted({at - 1 for row in rows for start, end in row.learnt for at in range(max(start, 1), end)})
    changes = {
        "input_ids": input_ids,
        "attention_mask": real,
        "labels": torch.where(labelled == 1, input_ids, IGNORE_INDEX),
        "label_columns": on_device(np.array(predicting, dtype=np.int64), ids),
        "sizes": sizes,
        "learnt": [row.learnt for row in rows],
        "contexts": [()] * len(rows),
        "step_sizes": step_sizes,
    }
    if "prompt_ids" in batch:
        lengths = [row.prompt for row in rows]
        prompts, mask = left_padded([row[:length] for row, length in zip(input_ids, lengths, strict=True)])
        changes |= {"prompt_ids": prompts, "prompt_mask": mask, "gold_spans": [[]] * len(rows)}
        changes |= {"answer_spans": [[]] * len(rows)}
        changes |= dict.fromkeys(("prompt_length", "context_length", "first_turn"), lengths)
    return cast("AnyBatch", {**batch, **changes})


def chunks_of(ids: Tensor, chunks: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """The tokens of chunks; a chunk is a row index and columns [start, stop).

    Returns:
        (N, n), padded on the right with arbitrary tokens of the row, and the lengths (N,).
    """
    table = np.array(chunks, dtype=np.int64).reshape(-1, 3)
    rows, starts, stops = (on_device(column, ids) for column in table.T.copy())
    most = int((table[:, 2] - table[:, 1]).max())
    columns = starts[:, None] + torch.arange(most, device=ids.device)
    return ids[rows[:, None], columns.clamp(max=ids.shape[1] - 1)], stops - starts


def on_device(numbers: np.ndarray, like: Tensor) -> Tensor:  # type: ignore[type-arg]
    """Copy numbers to a tensor's device from pinned memory; a copy from pageable memory may wait for the device."""
    found = torch.from_numpy(numbers)
    return (found.pin_memory() if like.is_cuda else found).to(like.device, non_blocking=True)


def _padded(rows: Sequence[np.ndarray], like: Tensor) -> Tensor:  # type: ignore[type-arg]
    return on_device(pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).numpy(), like)


def _columns(row: Row) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([np.asarray(part) if isinstance(part, range) else [-1] * len(part) for part in row.parts],
                          dtype=np.int64, casting="unsafe")  # fmt: skip


def _given(row: Row) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([[0] * len(part) if isinstance(part, range) else part for part in row.parts],
                          dtype=np.int64, casting="unsafe")  # fmt: skip


def _labelled(row: Row) -> np.ndarray:  # type: ignore[type-arg]
    found = np.zeros(row.tokens, dtype=np.int64)
    for start, end in row.learnt:
        found[start:end] = 1
    return found


def _real(row: Row) -> np.ndarray:  # type: ignore[type-arg]
    return np.ones(row.tokens, dtype=np.int64)
