"""A Hugging Face cache that holds sinks, kept pairs and the raw window only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lrsa_lit.attention.layout import Layout
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention.config import LRSAConfig
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream


class LRSACache(Cache):
    """The compressed cache of a model with LRSA attention enabled (``model.generate(…, past_key_values=cache)``).

    Generating with it obeys the rule of the parallel pass: partitions are compressed where the rule's chunks start,
    whatever the calls. Rows may have unequal lengths; pads are never kept.

    Args:
        config: the rule, the same that the model was enabled with.
        num_layers: layers of the model (``model.config.num_hidden_layers``).
    """

    def __init__(self, config: LRSAConfig, num_layers: int) -> None:
        self.config = config
        super().__init__(layers=[LRSACacheLayer(config.for_layer(layer)) for layer in range(num_layers)])

    def begin(self, layout: Layout, batch: int) -> None:
        """Tell all layers which columns of the next call are real; called once per forward, before the layers."""
        rows = batch if layout.row_spans is None else sum(start < stop for start, stop in layout.row_spans)
        if layout.cu_seqlens is not None and len(layout.cu_seqlens) - 1 > rows:
            raise UserError("position_ids: they restart inside a row, but packed sequences cannot be cached")
        for layer in self.layers:
            layer.begin(layout, batch)

    def stored_tokens(self) -> list[int]:
        """Tokens stored per head and layer, summed over the rows."""
        return [layer.stored_tokens() for layer in self.layers]


class LRSACacheLayer(CacheLayerMixin):
    """One layer: a stream for all rows while they are equally long, else a stream per row."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, config: LRSAConfig | None) -> None:
        super().__init__()
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self._streams: list[KeyValueStream] = []
        self._columns = 0
        self._begun = False
        self._pending: tuple[Tensor, Tensor] | None = None
        self._spans: tuple[tuple[int, int], ...] | None = None

    def begin(self, layout: Layout, batch: int) -> None:
        """Prepare for new columns of ``batch`` rows, of which the layout says which are real."""
        if not self._streams:
            self._batch = batch
            self._streams = [KeyValueStream(self.config)]
        elif batch != self._batch:
            raise UserError(f"cache: it holds {self._batch} rows and cannot continue {batch}; make a new one")
        self._begun = True
        self._spans = layout.row_spans
        if self._spans is not None and len(set(self._spans)) > 1 and len(self._streams) < batch:
            (shared,) = self._streams
            self._streams = [shared.rows(torch.tensor([row])) for row in range(batch)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hold the new keys and values (B, H, N, D) until :meth:`attend` takes them in; returns them unchanged."""
        if not self._begun:
            raise UserError("cache: LRSACache needs a model with LRSA attention; call lrsa_lit.attention.enable first")
        self.is_initialized, self._begun = True, False
        self._pending = key_states, value_states
        self._columns += key_states.shape[2]
        return key_states, value_states

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens' queries (B, Hq, N, D); outputs of pads are 0."""
        assert self._pending is not None
        (key, value), self._pending = self._pending, None
        if len(self._streams) == 1:
            start, stop = (0, query.shape[2]) if self._spans is None else self._spans[0]
            if start >= stop:
                return torch.zeros_like(query)
            real = (slice(None), slice(None), slice(start, stop))
            return _place(self._streams[0].attend(query[real], key[real], value[real], scale), query, start)
        output = torch.zeros_like(query)
        for row, stream in enumerate(self._streams):
            start, stop = (0, query.shape[2]) if self._spans is None else self._spans[row]
            part = (slice(row, row + 1), slice(None), slice(start, stop))
            if start < stop:
                output[part] = stream.attend(query[part], key[part], value[part], scale)
        return output

    def stored_tokens(self) -> int:
        """Tokens stored per head, summed over the rows."""
        pairs = [stream.stored for stream in self._streams]
        return sum(pair[0].shape[0] * pair[0].shape[2] for pair in pairs if pair is not None)

    def get_seq_length(self) -> int:
        """Columns seen so far, dropped ones and pads included: what true positions are counted from."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns seen: the layout, not a mask, tells the attention what is visible."""
        return self._columns + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate ahead."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        if not self._streams:
            return
        if len(self._streams) == 1:
            self._streams = [self._streams[0].rows(indices)]
        else:
            self._streams = [self._streams[row].rows(torch.tensor([0])) for row in indices.tolist()]
        self._batch = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        if self._streams:
            self.batch_select_indices(torch.arange(self._batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: dropped tokens cannot come back."""
        raise UserError("cache: LRSACache cannot be cropped (assisted decoding needs that); use a dense cache for it")


def compressed_cache(cache: Any, config: LRSAConfig, num_layers: int) -> LRSACache | None:
    """The cache if it is a compressed one, which must have the model's rule; None if it keeps everything."""
    if not isinstance(cache, LRSACache):
        if getattr(cache, "is_compileable", False):
            raise UserError("past_key_values: static caches are not allowed; use LRSACache or a dynamic cache")
        return None
    if (len(cache.layers), cache.config) != (num_layers, config):
        has, needs = (
            f"{count} layers, {rule}" for count, rule in ((len(cache.layers), cache.config), (num_layers, config))
        )
        raise UserError(f"past_key_values: the LRSACache has {has}; this model needs {needs}")
    return cache


def _place(output: Tensor, query: Tensor, start: int) -> Tensor:
    """Outputs of the real columns, zeros at the pads around them."""
    if output.shape == query.shape:
        return output
    padded = torch.zeros_like(query)
    padded[:, :, start : start + output.shape[2]] = output
    return padded
