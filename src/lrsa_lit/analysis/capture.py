"""Record what the layers of a model keep, while it runs.

Nothing here decides what is kept: the operator's own ``select`` does, on the keys and values that the attention sees.
Dimensions: B rows, T tokens, H key-value heads, P compressed partitions, K top_k, L lag_size.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lrsa_lit.analysis.record import LayerSelection, Sample, SelectionRecord
from lrsa_lit.attention import AttachedRule, Layout, LRSAConfig, base_of, enabled_config, observing
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Rule, Selection, Selector, of_sequence, select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrsa_lit.data.collate import Batch

# Of a batch as a whole.
_NO_ROWS = ("label_columns", "position_ids", "boundaries")
_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Captured:
    """What each layer kept of one sequence of a forward, of so many real tokens; None where the layer is dense."""

    length: int
    layers: tuple[LayerSelection | None, ...]


class Capture:
    """The forwards of a :func:`capture` block."""

    def __init__(self) -> None:
        # By the identity of the layout, which all layers of one forward share; layers that gradient checkpointing runs
        # again find their place. The layout is kept, so that no later one can take its identity.
        self._forwards: dict[int, tuple[Layout, dict[int, list[tuple[int, LayerSelection | None]]]]] = {}

    @property
    def forwards(self) -> list[list[Captured]]:
        """The sequences of each forward, in the order of their rows; a row of pads alone holds none."""
        return [
            [
                Captured(pieces[0][0], tuple(selection for _, selection in pieces))
                for pieces in zip(*(layers[index] for index in sorted(layers)), strict=True)
            ]
            for _, layers in self._forwards.values()
        ]

    @torch.no_grad()
    def observe(self, attached: AttachedRule, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Take down what one layer keeps in one forward."""
        pieces: list[tuple[int, LayerSelection | None]] = []

        def keep_pieces(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            pieces.extend(_sequences(attached, key, value, cu_seqlens))
            return query

        # The layout cuts the rows into sequences here just as it does for the attention.
        layout.apply(keep_pieces, query, key, value)
        self._forwards.setdefault(id(layout), (layout, {}))[1][attached.layer] = pieces


@contextlib.contextmanager
def capture(model: Any) -> Iterator[Capture]:
    """Record what each layer keeps in the forwards of a block.

    Padded rows, packed rows and forwards that continue an ordinary cache are recorded by sequence. A model outside of
    such a block runs as if this module did not exist.

    Args:
        model: a causal language model that LRSA is enabled on. The block must not switch its rule.

    Raises:
        UserError: LRSA is not enabled, its compressor makes new pairs and selects none, or every layer is dense.
    """
    config = enabled_config(base_of(model))
    if config is not None:
        _check(config, base_of(model).config.get_text_config().num_hidden_layers)
    found = Capture()
    with observing(model, found.observe):
        yield found


@torch.no_grad()
def record(
    model: Any, batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase, *, name: str, step: int = 0
) -> SelectionRecord:
    """Run the prompts of some batches through a model and record what is kept when the answer begins.

    Args:
        model: a causal language model that LRSA is enabled on; it is left in the mode that it came in.
        batches: batches of a data module, at least one.
        tokenizer: gives the tokens' texts.
        name: what the model is called.
        step: training steps that the weights have seen.
    """
    batches = list(batches)
    with _evaluating(model), capture(model) as found:
        for batch in batches:
            model(input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], use_cache=False, logits_to_keep=1)
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
    )


def first_rows(batch: Batch, count: int) -> Batch:
    """The first ``count`` rows of a batch, of all its fields that have rows."""
    return {  # type: ignore[return-value]
        name: values if name in _NO_ROWS else values[:count]  # type: ignore[index]
        for name, values in batch.items()
    }


def shape_digest(config: Any) -> str:
    """Twelve hex digits of what makes the selections of two models comparable: family, vocabulary, layers and heads."""
    text = config.get_text_config()
    values: Mapping[str, Any] = {name: getattr(text, name, None) for name in _SHAPE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _check(config: LRSAConfig, layers: int) -> None:
    if not isinstance(config.compressor, Selector):
        name = type(config.compressor).__name__
        raise UserError("compressor", name, reason="makes new pairs and selects none, so there is nothing to record")
    if len(config.dense_layers) == layers:
        raise UserError("dense_layers", reason="every layer is dense, so there is nothing to record")


def _sequences(
    attached: AttachedRule, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Iterator[tuple[int, LayerSelection | None]]:
    """Length and selection of each sequence in keys and values (B, H, T, D), or packed in (1, H, T, D)."""
    boundaries = [0, key.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
    rule = attached.rule
    if rule is None:
        yield from ((length, None) for _ in range(key.shape[0]) for length in lengths)
        return
    chosen = select(key, value, rule, cu_seqlens=cu_seqlens, impl=attached.state.impl)
    parts = [of_sequence(chosen, rule, boundaries, index) for index in range(len(lengths))]
    for row in range(key.shape[0]):
        for length, part in zip(lengths, parts, strict=True):
            yield length, _layer(part, row, rule)


def _layer(part: Selection, row: int, rule: Rule) -> LayerSelection:
    """One row of a selection, with the scores (H, P, L) cut to those of the kept tokens (H, P, K)."""
    indices = part.indices[row]
    scores = part.scores[row].gather(-1, (indices - rule.sink_size) % rule.lag_size)
    return LayerSelection(indices.int().cpu().numpy(), scores.float().cpu().numpy())


def _sample(batch: Batch, row: int, sequence: Captured) -> Sample:
    """A captured sequence with what the batch knows of it; prompts are padded on the left."""
    tokens = batch["prompt_ids"][row, -sequence.length :]
    return Sample(
        id=batch["id"][row],
        token_ids=tokens.cpu().numpy().astype(np.int32),
        gold_spans=tuple(batch["gold_spans"][row]),
        answer_spans=tuple(batch["answer_spans"][row]),
        layers=sequence.layers,
    )


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
