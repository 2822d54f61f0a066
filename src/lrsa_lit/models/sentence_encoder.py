"""CPC's sentence encoder (arXiv 2409.01227): unit vectors from a causal language model without its causal mask.

A sentence's vector is the mean of its tokens' last hidden states, from one pass that includes the surrounding
sentences.

Dimensions: B rows, T tokens of the longest row, S sentences, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from lrsa_lit.attention.families import attention_modules
from lrsa_lit.errors import UserError

NO_SEGMENT = -1
"""The segment of tokens that belong to no sentence, such as padding."""

Sentences = Sequence[Sequence[int]]
"""The token ids of each sentence of a context, encoded without special tokens."""


def remove_causal_mask(model: Any) -> None:
    """Let each token of a causal language model attend to all tokens of its row, permanently.

    Args:
        model: a transformers model, or peft's wrapper around one.

    Raises:
        UserError: a layer is not plain causal attention through transformers' interface, or the model stays causal.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = attention_modules(base)
    # The config decides about the mask; without a mask, kernels use the module's setting.
    base.config.get_text_config().is_causal = False
    for module in modules:
        module.is_causal = False  # type: ignore[assignment]
    if not _looks_ahead(model):
        raise UserError("model", type(base).__name__, reason="remains causal, whatever its config says")


@torch.no_grad()
def _looks_ahead(model: Any) -> bool:
    """Whether the first token's state depends on the last token, with and without padding."""
    device = next(model.parameters()).device
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]], device=device)
    training = model.training
    model.eval()
    try:
        alone = states(model, ids, torch.ones_like(ids))[:, 0]
        mask = torch.tensor([[1, 1, 1, 0]] * 2, device=device)
        padded = states(model, torch.cat([ids, ids[:, :1]], dim=1), mask)[:, 0]
    finally:
        model.train(training)
    return not (torch.equal(*alone) or torch.equal(*padded))


def states(model: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states (B, T, D), after the final norm.

    Args:
        model: a model after :func:`remove_causal_mask`.
        input_ids: (B, T) int64.
        mask: (B, T), 1 for tokens and 0 for padding, which no token attends to.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Tensor = base.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return found


def segment_means(hidden: Tensor, segments: Tensor, count: int) -> Tensor:
    """The mean state of each segment's tokens, scaled to length 1, at least float32; zeros for an empty segment.

    Args:
        hidden: (B, T, D).
        segments: (B, T) int64, each token's segment in [0, ``count``), or NO_SEGMENT.
        count: C, the number of segments per row.

    Returns:
        (B, C, D).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # A matrix product, because adding by index does not sum in a fixed order on every device.
    with torch.autocast(hidden.device.type, enabled=False):
        members = segments[:, None] == torch.arange(count, device=segments.device)[:, None]
        sums = members.to(dtype) @ hidden.to(dtype)
        # The sum has the same direction as the mean.
        return normalize(sums, dim=-1)


def balanced_chunks(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Split sentences into as few runs of at most ``max_tokens`` as possible, and keep the longest run short.

    Args:
        lengths: tokens of each sentence.
        max_tokens: the most tokens of a run.

    Returns:
        The sentence indices of each run; empty without sentences.

    Raises:
        UserError: a sentence is longer than ``max_tokens``.
    """
    if not lengths:
        return []
    if max(lengths) > max_tokens:
        raise UserError("max_tokens", max_tokens, f"at least {max(lengths)}, the tokens of the longest sentence")
    fewest = len(list(_runs(lengths, max_tokens)))
    low, high = max(lengths), max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(list(_runs(lengths, middle))) <= fewest else (middle + 1, high)
    return list(_runs(lengths, low))


def _runs(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Runs of at most ``most`` tokens, each filled before the next one starts."""
    start = taken = 0
    for place, length in enumerate(lengths):
        if taken + length > most and place > start:
            yield range(start, place)
            start, taken = place, 0
        taken += length
    yield range(start, len(lengths))


@torch.no_grad()
def embeddings(
    model: Any, contexts: Sequence[Sentences], max_tokens: int = 6144, batch_tokens: int = 16384
) -> list[Tensor]:
    """The vectors (S, D) of the sentences of each context, on the model's device.

    A context of more than ``max_tokens`` is split between sentences into chunks of about equal length, each with its
    own pass. A question is a context of one sentence.

    Args:
        model: a model after :func:`remove_causal_mask`, in evaluation mode.
        contexts: the contexts; each sentence has at least one token.
        max_tokens: the most tokens of a chunk.
        batch_tokens: the most tokens of a batch of rows, including padding; a longer row is a batch by itself.

    Raises:
        UserError: a sentence is longer than ``max_tokens``.
    """
    device = next(model.parameters()).device
    cut = [balanced_chunks(list(map(len, sentences)), max_tokens) for sentences in contexts]
    chunks = [(row, chunk) for row, runs in enumerate(cut) for chunk in runs]
    found: list[list[Tensor]] = [[] for _ in contexts]
    rows = [[contexts[row][place] for place in chunk] for row, chunk in chunks]
    for batch in _batches([sum(map(len, sentences)) for sentences in rows], batch_tokens):
        ids, mask, segments = joined([rows[number] for number in batch], device)
        count = max(len(chunks[number][1]) for number in batch)
        means = segment_means(states(model, ids, mask), segments, count)
        for number, of_chunk in zip(batch, means, strict=True):
            row, chunk = chunks[number]
            found[row].append(of_chunk[: len(chunk)])
    width = model.config.get_text_config().hidden_size
    return [torch.cat(parts) if parts else torch.zeros(0, width, device=device) for parts in found]


def joined(rows: Sequence[Sentences], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of sentences as token ids, mask and segments, each (B, T) int64 and padded on the right."""
    ids = [[token for sentence in row for token in sentence] for row in rows]
    numbers = [[number for number, sentence in enumerate(row) for _ in sentence] for row in rows]
    masks = [[1] * len(row) for row in ids]
    padded = [
        pad_sequence([torch.tensor(row, dtype=torch.int64) for row in each], batch_first=True, padding_value=value)
        for each, value in ((ids, 0), (masks, 0), (numbers, NO_SEGMENT))
    ]
    ids_, mask, segments = (each.to(device) for each in padded)
    return ids_, mask, segments


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The indices of the rows of each batch, in order."""
    batch: list[int] = []
    for place, length in enumerate(lengths):
        longest = max([length, *(lengths[other] for other in batch)])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
