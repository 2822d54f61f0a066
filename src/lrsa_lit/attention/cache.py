"""A Hugging Face cache that holds sinks, kept pairs and the raw window only."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lrsa_lit.attention.layout import Layout
from lrsa_lit.attention.rules import (
    arguments_by_name,
    attention_modules,
    base_of,
    cache_of_call,
    enabled_state,
    warn_if_trained_otherwise,
)
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, LRSAConfig
from lrsa_lit.ops.sparse_attention.geometry import stored_size
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream


class LRSACache(Cache):
    """The compressed cache of a model: ``model.generate(…, past_key_values=LRSACache.of(model))``.

    With LRSA attention enabled, any calls give what the parallel pass gives: partitions are compressed where the rule's
    chunks start, wherever the calls end. Rows may have unequal lengths; pads are never kept.

    With the model's stock attention the cache hands out what it holds as an ordinary past, so any kernel serves
    decoding. A call must then not reach over a compression (:func:`~lrsa_lit.attention.prefill` makes such calls), and
    pads are refused.

    Args:
        config: the rule, the same that the model was enabled with.
        num_layers: layers of the model (``model.config.num_hidden_layers``).
    """

    def __init__(self, config: LRSAConfig, num_layers: int) -> None:
        self.config = config
        super().__init__(layers=[LRSACacheLayer(config.for_layer(layer)) for layer in range(num_layers)])

    @classmethod
    def of(cls, model: Any, config: LRSAConfig | None = None) -> LRSACache:
        """An empty cache for a model.

        Args:
            model: a causal language model, LRSA enabled or with its stock attention.
            config: the rule for a model with stock attention; an enabled one has its own.

        Raises:
            UserError: another rule than the enabled one, none for a stock model, or a model that LRSA does not support.
        """
        inner = base_of(model)
        state = enabled_state(inner)
        if state is not None:
            if config not in (None, state.config):
                raise UserError(f"config: {config} is not the rule {state.config} that the model was enabled with")
            return cls(state.config, len(state.modules))
        if config is None:
            raise UserError("config: a model with its stock attention needs an LRSAConfig; or call enable(model, …)")
        layers = len(attention_modules(inner))
        config.check_layers(layers)
        if config.dense_layers:
            raise UserError(
                f"config.dense_layers: {config.dense_layers} need enable(model, …); stock layers share one mask"
            )
        warn_if_trained_otherwise(inner, config)
        cache = cls(config, layers)
        watch = inner.base_model.register_forward_pre_hook(_Watch(cache), with_kwargs=True)
        weakref.finalize(cache, watch.remove)
        return cache

    def begin(self, layout: Layout | None, batch: int, impl: Impl = "auto") -> None:
        """Tell all layers what comes; called once per forward, before the layers.

        Args:
            layout: which columns of the call are real; None if the model has its stock attention.
            batch: rows.
            impl: implementation of the operator.
        """
        if layout is not None and layout.cu_seqlens is not None:
            rows = batch if layout.row_spans is None else sum(start < stop for start, stop in layout.row_spans)
            if len(layout.cu_seqlens) - 1 > rows:
                raise UserError("position_ids: they restart inside a row, but packed sequences cannot be cached")
        for layer in self.layers:
            layer.begin(layout, batch, impl)

    @property
    def holds_pads(self) -> bool:
        """Whether some row has seen fewer tokens than columns."""
        return any(stream.seen != self.get_seq_length() for stream in self.layers[0].streams)

    def next_positions(self, length: int) -> Tensor:
        """(B or 1, ``length``) positions of the next columns if all are real, on the CPU."""
        seen = torch.tensor([stream.seen for stream in self.layers[0].streams], device="cpu")
        return seen[:, None] + torch.arange(length, device="cpu")

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
        self.stock = False
        self._streams: list[KeyValueStream] = []
        self._batch = 0
        self._columns = 0
        self._begun = False
        self._spans: tuple[tuple[int, int], ...] | None = None

    def begin(self, layout: Layout | None, batch: int, impl: Impl) -> None:
        """Prepare for new columns of ``batch`` rows, of which the layout says which are real."""
        if not self._streams:
            self._batch = batch
            self._streams = [KeyValueStream(self.config, impl)]
        elif batch != self._batch:
            raise UserError(f"cache: it holds {self._batch} rows and cannot continue {batch}; make a new one")
        self._begun, self.stock = True, layout is None
        self._spans = None if layout is None else layout.row_spans
        if self.stock and len(self._streams) > 1:
            raise UserError("cache: its rows are of unequal lengths, which stock attention cannot continue")
        if self._spans is not None and len(set(self._spans)) > 1 and len(self._streams) < batch:
            (shared,) = self._streams
            self._streams = [shared.rows(torch.tensor([row])) for row in range(batch)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new keys and values (B, H, N, D).

        Returns:
            With stock attention all keys and values that are stored now (B, H, stored, D). Else the new ones, which
            :meth:`attend` stores.
        """
        self._check(key_states)
        self.is_initialized, self._begun = True, False
        self._columns += key_states.shape[2]
        if self.stock:
            return self._streams[0].extend(key_states, value_states)
        return key_states, value_states

    def _check(self, key: Tensor) -> None:
        if not self._begun:
            raise UserError(
                "cache: LRSACache needs a model with LRSA attention (lrsa_lit.attention.enable), or to be made by "
                "LRSACache.of(model, config) for its stock attention"
            )
        stored = self._streams[0].stored
        if stored is not None and (stored[0].shape[1], stored[0].shape[3]) != (key.shape[1], key.shape[3]):
            has, given = (f"{pair.shape[1]} heads of {pair.shape[3]} channels" for pair in (stored[0], key))
            raise UserError(f"cache: it holds {has} of another model and cannot continue {given}; make a new one")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of new tokens.

        Args:
            query: (B, Hq, N, D).
            key: (B, H, N, D), as :meth:`update` was given.
            value: (B, H, N, D).
            scale: factor of the scores.

        Returns:
            (B, Hq, N, D); outputs of pads are 0.
        """
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

    @property
    def stream(self) -> KeyValueStream | None:
        """What all rows share; None before the first call, and where their lengths differ."""
        return self._streams[0] if len(self._streams) == 1 else None

    @property
    def streams(self) -> list[KeyValueStream]:
        """One that all rows share, or one for each row; none before the first call."""
        return self._streams

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first call."""
        return self._batch

    def count(self, columns: int) -> None:
        """Take note of columns that somebody wrote into the :attr:`streams` past :meth:`update`."""
        self._columns += columns

    def stored_tokens(self) -> int:
        """Tokens stored per head, summed over the rows."""
        pairs = [stream.stored for stream in self._streams]
        return sum(pair[0].shape[0] * pair[0].shape[2] for pair in pairs if pair is not None)

    def get_seq_length(self) -> int:
        """Columns seen so far, dropped ones and pads included: what true positions are counted from."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the coming call attends to, and the position of the first if they stood without gaps.

        With LRSA attention all columns seen: the layout, not a mask, tells what is visible.
        """
        if not self.stock or not self._begun:
            return self._columns + query_length, 0
        (stream,) = self._streams
        if stream.crosses(query_length):
            raise UserError(
                f"input_ids: {query_length} tokens behind {self._columns} reach over a compression, which stock "
                "attention cannot follow; feed them with lrsa_lit.attention.prefill first"
            )
        # The last of the new tokens sees what is stored once it is in.
        stored = stored_size(self._columns + query_length, stream.rule)
        return stored, self._columns + query_length - stored

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


class _Watch:
    """Before a decoder with stock attention runs with the cache: refuse what would break the rule without a word."""

    def __init__(self, cache: LRSACache) -> None:
        self.cache = weakref.ref(cache)

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = arguments_by_name(decoder, args, kwargs)
        cache = cache_of_call(given)
        # Of a model that was enabled since, its own hook begins the call.
        if not isinstance(cache, LRSACache) or self.cache() is not cache or enabled_state(decoder) is not None:
            return
        mask = given.get("attention_mask")
        if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
            raise UserError(
                "attention_mask: with stock attention LRSACache takes rows without pads only; call enable(model, …)"
            )
        tokens = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        cache.begin(None, tokens.shape[0])


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
