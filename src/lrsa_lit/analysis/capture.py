"""Record which tokens a model's layers keep while it runs, by calling the operator's ``select`` on their inputs.

Dimensions: B rows, T tokens, H key-value heads, P compressed partitions, K top_k, L lag_size.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrsa_lit.analysis.record import Sample, SelectionRecord
from lrsa_lit.attention import AttachedRule, Layout, LRSAConfig, base_of, enabled_config, observing
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import HeadRules, Selector, of_sequence, select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrsa_lit.data.collate import Batch

_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads")  # fmt: skip


class LayerSelection(NamedTuple):
    """The selection of one layer in one sequence: positions and scores (H, P, K), as in :class:`Sample`."""

    positions: NDArray[np.int32]
    scores: NDArray[np.float32]


class Captured(NamedTuple):
    """The selection of each layer in one sequence of ``length`` tokens, without padding; None for dense layers."""

    length: int
    layers: dict[int, LayerSelection | None]


class Capture:
    """The forward passes of a :func:`capture` block."""

    def __init__(self) -> None:
        # Keyed by the identity of the layout, which all layers of one forward pass share. A layer that gradient
        # checkpointing runs again overwrites its entry. Keeping the layout prevents reuse of its identity.
        self._forwards: dict[int, tuple[Layout, list[Captured]]] = {}

    @property
    def forwards(self) -> list[list[Captured]]:
        """The sequences of each forward pass, in the order of rows; a row with only padding has none."""
        return [sequences for _, sequences in self._forwards.values()]

    @torch.no_grad()
    def observe(self, attached: AttachedRule, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Record the selections of one layer in one forward pass."""
        pieces: list[tuple[int, LayerSelection | None]] = []

        def keep_pieces(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            pieces.extend(_sequences(attached, query, key, value, cu_seqlens))
            return query

        # The layout splits the rows into sequences, exactly as for the attention.
        layout.apply(keep_pieces, query, key, value)
        _, sequences = self._forwards.setdefault(id(layout), (layout, [Captured(length, {}) for length, _ in pieces]))
        for sequence, (_, selection) in zip(sequences, pieces, strict=True):
            sequence.layers[attached.layer] = selection


@contextlib.contextmanager
def capture(model: Any) -> Iterator[Capture]:
    """Record which tokens each layer keeps of each sequence in a block's forward passes (padded, packed or continued).

    Args:
        model: a causal language model with LRSA enabled. The block must not change its rule.

    Raises:
        UserError: LRSA is not enabled, or the rule is :func:`unrecordable`.
    """
    inner = base_of(model)
    config = enabled_config(inner)
    reason = None if config is None else unrecordable(config, inner.config.get_text_config().num_hidden_layers)
    if reason is not None:
        raise reason
    found = Capture()
    with observing(model, found.observe):
        yield found


def unrecordable(config: LRSAConfig, layers: int) -> UserError | None:
    """The error why a rule has no selections to record in a model with ``layers`` layers; None if it has."""
    name = type(config.compressor).__name__
    if config.system is not None:
        return UserError("system", type(config.system).__name__, reason="has no partitions to record")
    if not isinstance(config.compressor, Selector):
        return UserError("compressor", name, reason="makes new pairs and selects none, so nothing can be recorded")
    if config.head_top_k is not None:
        return UserError("head_top_k", reason="is set, but a record needs a single K: set top_k instead")
    if len(config.dense_layers) == layers:
        return UserError("dense_layers", reason="every layer is dense, so there is nothing to record")
    return None


@torch.no_grad()
def record(
    model: Any, batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase, *, name: str, step: int = 0
) -> SelectionRecord:
    """Run the prompts of some batches through a model, and record which tokens are kept when the answer begins.

    Args:
        model: a causal language model with LRSA enabled; its training mode is restored.
        batches: batches of a data module, at least one.
        tokenizer: decodes the tokens.
        name: name of the model.
        step: number of training steps of the weights.
    """
    batches, modes = list(batches), [(module, module.training) for module in model.modules()]
    # Evaluation mode turns off dropout and gradient checkpointing; each module's mode is restored below.
    model.eval()
    try:
        with capture(model) as found:
            for batch in batches:
                prompts = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
                model(**prompts, use_cache=False, logits_to_keep=1)
    finally:
        for module, training in modes:
            module.training = training
    samples = tuple(
        _sample(batch, row, sequence)
        for batch, sequences in zip(batches, found.forwards, strict=True)
        for row, sequence in enumerate(sequences)
    )
    config = enabled_config(base_of(model))
    assert config is not None
    occurring = sorted({int(token) for sample in samples for token in sample.token_ids})
    return SelectionRecord(
        samples=samples,
        rule=config.to_dict(),
        model=name,
        digest=shape_digest(base_of(model).config),
        step=step,
        texts={token: tokenizer.decode([token]) for token in occurring},
        layers=[index for index, kept in found.forwards[0][0].layers.items() if kept is not None],
    )


def first_rows(batch: Batch, count: int) -> Batch:
    """The first ``count`` rows of all fields of a batch that have rows."""
    of_all = ("label_columns", "position_ids", "boundaries")
    return {name: values if name in of_all else values[:count] for name, values in batch.items()}  # type: ignore


def shape_digest(config: Any) -> str:
    """Digest of a model's family, vocabulary, layers and heads (12 hex digits); equal for comparable selections."""
    values = {name: getattr(config.get_text_config(), name, None) for name in _SHAPE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _sequences(
    attached: AttachedRule, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[int, LayerSelection | None]]:
    """Yield length and selection of each sequence in keys and values (B, H, T, D), or packed in (1, H, T, D)."""
    boundaries = [0, key.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
    rule = attached.rule
    assert not isinstance(rule, HeadRules)
    if rule is None:
        yield from [(length, None) for length in lengths] * key.shape[0]
        return
    chosen = select(key, value, rule, query=query, cu_seqlens=cu_seqlens, impl=attached.state.impl)
    parts = [of_sequence(chosen, rule, boundaries, index) for index in range(len(lengths))]
    for row in range(key.shape[0]):
        for length, part in zip(lengths, parts, strict=True):
            indices = part.indices[row]
            # The scores (H, P, K) of the kept tokens, from all scores (H, P, L).
            scores = part.scores[row].gather(-1, (indices - rule.sink_size) % rule.lag_size)
            yield length, LayerSelection(indices.int().cpu().numpy(), scores.float().cpu().numpy())


def _sample(batch: Batch, row: int, sequence: Captured) -> Sample:
    """A sample from a captured sequence and its row in the batch; prompts are padded on the left."""
    positions, scores = zip(*(layer for layer in sequence.layers.values() if layer is not None), strict=True)
    return Sample(
        id=batch["id"][row],
        token_ids=batch["prompt_ids"][row, -sequence.length :].cpu().numpy().astype(np.int32),
        gold_spans=tuple(batch["gold_spans"][row]),
        answer_spans=tuple(batch["answer_spans"][row]),
        positions=np.stack(positions),
        scores=np.stack(scores),
    )
