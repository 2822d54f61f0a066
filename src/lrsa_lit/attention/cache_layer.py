"""One layer of the compressed cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lrsa_lit.attention.layout import Layout
from lrsa_lit.attention.measured import Measured
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import (
    HeadRules,
    Held,
    Impl,
    KeyValueStream,
    Rule,
    Stream,
    attend_by_length,
    attend_together,
    attended_pairs,
    can_attend_together,
    stored_size,
)


class Past(NamedTuple):
    """The content of a layer between two calls.

    Attributes:
        rows: rows of the batch.
        columns: columns seen, including pads.
        token_bytes: bytes of a token in a dense cache.
        seen: tokens that each stream has seen: one stream for all rows, or one per row.
        held: for each stream, the content of each of its parts.
    """

    rows: int
    columns: int
    token_bytes: int
    seen: list[int]
    held: list[list[Held]]


class LRSACacheLayer(CacheLayerMixin):
    """One layer: a single stream while all rows have the same length, else one stream per row.

    Rows of unequal lengths attend together, as packed sequences, and in a first call are compressed together. Latents
    and most systems go row by row, and so do calls of single tokens, which the decoder serves on a GPU.

    In each call, the attention must call :meth:`update` once with its new tokens and then :meth:`attend` once. Stock
    attention attends by itself and calls :meth:`update` only. Any other order is refused.

    Args:
        rule: the rule of the layer, or the rules of its heads; None if it is dense or has a system.
        new_stream: makes an empty stream for the layer.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, rule: Rule | HeadRules | None, new_stream: Callable[[Impl], Stream]) -> None:
        super().__init__()
        self.rule = rule
        self._new_stream = new_stream
        self.reset()

    def reset(self) -> None:
        """Remove all tokens."""
        self.keys = self.values = None
        self.is_initialized = False
        self.stock = False
        # One stream for all rows, or one per row; none before the first call.
        self.streams: list[Stream] = []
        self.rows = 0
        # If true, calls attend to the past but are not stored: see LRSACache.probing.
        self.probing = False
        self._columns = self._token_bytes = 0
        self._step: Literal["idle", "begun", "given", "storing"] = "idle"
        self._given: tuple[torch.Size, torch.Size] | None = None
        self._layout = Layout()

    def begin(self, layout: Layout | None, batch: int, impl: Impl) -> None:
        """Prepare for new columns of ``batch`` rows; the layout says which columns are real."""
        if not self._columns:
            self.rows = batch
            self.streams = [self._new_stream(impl)]
        elif batch != self.rows:
            raise UserError("cache", reason=f"it holds {self.rows} rows and cannot continue {batch}; make a new one")
        self._step, self.stock = "begun", layout is None
        self._layout = Layout() if layout is None else layout
        if self.stock and len(self.streams) > 1:
            raise UserError("cache", reason="its rows have unequal lengths, which stock attention cannot continue")
        if self._layout.row_spans is not None and len(set(self._layout.row_spans)) > 1:
            self.split()

    def split(self) -> None:
        """Give each row its own stream."""
        if self.streams and len(self.streams) < self.rows:
            (shared,) = self.streams
            self.streams = [shared.rows(torch.tensor([row])) for row in range(self.rows)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Receive new keys and values (B, H, N, D).

        Returns:
            The same tensors, which :meth:`attend` then stores. With stock attention, all pairs that are now stored,
            (B, H, stored, D).

        Raises:
            UserError: no call was begun, the layer stores twice in one call, or the heads have another shape than the
                stored ones.
        """
        if self._step != "begun":
            raise UserError(
                "cache",
                reason="LRSACache needs a model with LRSA attention (lrsa_lit.attention.enable), or to be made by "
                "LRSACache.of(model, config) for its stock attention; each layer stores once per call, so gradient "
                "checkpointing, which runs layers again, excludes it",
            )
        has, given = [part.stored_shape for part in self.streams[0].parts], (key_states.shape[1], key_states.shape[3])
        stored = [shape for shape in has if shape is not None]
        if stored and (sum(shape[1] for shape in stored), stored[0][3]) != given:
            shapes = (sum(shape[1] for shape in stored), stored[0][3]), given
            held, new = (f"{heads} heads of {channels} channels" for heads, channels in shapes)
            raise UserError("cache", reason=f"it holds {held} of another model and cannot continue {new}")
        self.is_initialized = True
        # The bytes of each token in a dense cache.
        self._token_bytes = sum(states[0, :, 0].nbytes for states in (key_states, value_states))
        if not self.stock:
            self._step, self._given = "given", (key_states.shape[:3], value_states.shape[:3])
            return key_states, value_states
        self._step = "storing"
        pair = self._stock_stream.extend(key_states, value_states)
        self.count(key_states.shape[2])
        return pair

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens that :meth:`update` received; outputs of pads are 0.

        Queries and output are (B, Hq, N, D), keys and values (B, H, N, D). Since :meth:`update`, keys may have gained
        channels with scores, and both may have gained channels with latents.

        Raises:
            UserError: these tokens were not passed to :meth:`update`, or the layer attends to them twice.
        """
        if self._step != "given" or self._given != (key.shape[:3], value.shape[:3]):
            raise UserError(
                "cache",
                reason="a layer must attend once to what it stored; this model's attend more often, to other keys, "
                "or without storing first (as in training with gradient checkpointing); run it without an LRSACache",
            )
        self._step = "storing"
        output = self._attend(query, key, value, scale)
        self.count(0 if self.probing else query.shape[2])
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        whole = (0, query.shape[2])
        spans = self._layout.row_spans or [whole] * self.rows
        if len(self.streams) == 1 and spans[0] == whole:
            return self._attend_of(self.streams[0])(query, key, value, scale)
        if len(self.streams) > 1 and query.shape[2] > 1 and not self.probing:
            new = [stream for stream, (start, stop) in zip(self.streams, spans, strict=True) if start < stop]
            if not new or can_attend_together(new):
                return self._attend_together(new, query, key, value, scale)
            if self.streams[0].part_by_part and not any(stream.seen for stream in self.streams):
                output, self.streams = attend_by_length(self.streams, spans, query, key, value, scale)
                return output
        if len(self.streams) > 1 and query.shape[2] == 1 and not self.probing and set(spans) == {whole}:
            together = type(self.streams[0]).attend_rows(self.streams, query, key, value, scale)
            if together is not None:
                return together
        output = torch.zeros_like(query)
        for row, stream in enumerate(self.streams):
            rows = slice(None) if len(self.streams) == 1 else slice(row, row + 1)
            start, stop = spans[row]
            real = rows, slice(None), slice(start, stop)
            if start < stop:
                output[real] = self._attend_of(stream)(query[real], key[real], value[real], scale)
        return output

    def _attend_together(
        self, streams: Sequence[Stream], query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        if self._layout.real is not None:
            return self._layout.apply(functools.partial(_attend_packed, streams, scale), query, key, value)
        batch, count = query.shape[0], query.shape[2]
        query, key, value = (tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value))
        output = attend_together(streams, query, key, value, range(0, batch * count + 1, count), scale)[0]
        rows: Tensor = output.unflatten(1, (batch, count))
        return rows.transpose(0, 1)

    def _attend_of(self, stream: Stream) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
        if not self.probing:
            return stream.attend
        assert isinstance(stream, KeyValueStream)
        return stream.probe

    @property
    def _stock_stream(self) -> KeyValueStream:
        """The stream that serves stock attention, which supports rules only."""
        (stream,) = self.streams
        assert isinstance(stream, KeyValueStream)
        return stream

    @property
    def is_done(self) -> bool:
        """Whether the layer has stored the call's tokens."""
        return self._step == "idle"

    @property
    def progress(self) -> tuple[int, ...] | None:
        """Columns and tokens seen, equal in all layers between two calls; None if an exception interrupted storing."""
        if self._step == "storing":
            return None
        return (self._columns, *(stream.seen for stream in self.streams)) if self._columns else (0,)

    def count(self, columns: int) -> None:
        """Count columns that the streams have stored."""
        self._columns += columns
        self._step = "idle"

    def stored_tokens(self) -> float:
        """Tokens stored per head, summed over the rows; the mean if heads differ."""
        return sum(map(_stored_tokens, self.streams))

    @property
    def nbytes(self) -> int:
        """Bytes held for all rows."""
        return sum(stream.nbytes for stream in self.streams)

    def measured(self, row: int) -> Measured:
        """The cost of a row's past."""
        shared = len(self.streams) == 1
        stream, rows = self.streams[0 if shared else row], self.rows if shared else 1
        held, peak = stream.nbytes / rows, stream.peak_nbytes / rows
        dense = stream.seen * self._token_bytes
        pairs, share = stream.cost_of(row if shared else 0)
        read = held if share is None else dense * share
        dense_pairs, stored = attended_pairs(stream.seen, None), _stored_tokens(stream) / rows
        return Measured(held, peak, read, dense, pairs, dense_pairs, stored, stream.seen, stream.seen)

    @property
    def rows_cost_alike(self) -> bool:
        """Whether :meth:`measured` is the same for all rows."""
        return len(self.streams) <= 1 and all(stream.rows_cost_alike for stream in self.streams)

    def probing_nbytes(self, row: int) -> float:
        """The most temporary bytes of a row: pairs of probes, or keys and values made from latents."""
        shared = len(self.streams) == 1
        return self.streams[0 if shared else row].probing_nbytes / (self.rows if shared else 1)

    def get_seq_length(self) -> int:
        """Columns seen so far, including dropped ones and pads. Transformers counts positions from this number."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that the next call attends to, and the position of the first if they had no gaps.

        With LRSA attention, all columns seen: visibility comes from the layout and not from a mask.
        """
        if not self.stock or self._step != "begun":
            return self._columns + query_length, 0
        stream = self._stock_stream
        if stream.crosses(query_length):
            reason = f"{query_length} tokens after {self._columns} cross a compression, which stock attention cannot"
            raise UserError("input_ids", reason=reason, hint="pass them to lrsa_lit.attention.prefill first")
        # The last new token sees everything that is stored after the call.
        stored = stored_size(self._columns + query_length, stream.rule)
        return stored, self._columns + query_length - stored

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: no memory is allocated in advance."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        if len(self.streams) == 1:
            self.streams = [self.streams[0].rows(indices)]
        elif self.streams:
            self.streams = [self.streams[row].rows(torch.tensor([0])) for row in indices.tolist()]
        self.rows = len(indices) if self.streams else 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        if self.streams:
            self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    @property
    def past(self) -> Past:
        """The content between two calls, as views. Only for rules and dense layers; systems hold more."""
        held = []
        for stream in self.streams:
            parts = stream.parts
            assert all(isinstance(part, KeyValueStream) for part in parts)
            held.append([part.held for part in parts if isinstance(part, KeyValueStream)])
        return Past(self.rows, self._columns, self._token_bytes, [stream.seen for stream in self.streams], held)

    def restore(self, past: Past, impl: Impl) -> None:
        """Continue from copies of the :attr:`past` of a layer with the same rule. This layer must be empty."""
        self.streams = []
        for seen, parts in zip(past.seen, past.held, strict=True):
            stream = self._new_stream(impl)
            for part, held in zip(stream.parts, parts, strict=True):
                assert isinstance(part, KeyValueStream)
                part.restore(seen, held)
            stream.seen = seen
            self.streams.append(stream)
        self.rows, self._columns, self._token_bytes, self.is_initialized = *past[:3], True

    def append_rows(self, other: LRSACacheLayer) -> None:
        """Append the rows of another cache's layer, which becomes empty. Afterwards each row has its own stream."""
        for layer in (self, other):
            layer.split()
        self.streams += other.streams
        self.rows += other.rows
        self._columns, self._token_bytes = max(self._columns, other._columns), other._token_bytes
        self.is_initialized = True
        other.reset()

    def replace_row(self, row: int, other: LRSACacheLayer) -> None:
        """Replace a row by the only row of another cache's layer, which becomes empty."""
        self.split()
        (self.streams[row],) = other.streams
        self._columns = max(self._columns, other._columns)
        other.reset()

    def drop_row(self, row: int) -> None:
        """Remove a row. Rows that already have their own streams keep their memory."""
        self.split()
        del self.streams[row]
        self.rows -= 1
        if not self.rows:
            self.reset()

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: dropped tokens cannot come back."""
        raise UserError("cache", reason="LRSACache cannot be cropped, as assisted decoding needs; use a dense cache")


def _attend_packed(
    streams: Sequence[Stream], scale: float, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None
) -> Tensor:
    assert cu_seqlens is not None
    return attend_together(streams, query, key, value, cu_seqlens.tolist(), scale)


def _stored_tokens(stream: Stream) -> float:
    """Stored tokens of all rows together, mean over the heads."""
    shapes = [shape for shape in (part.stored_shape for part in stream.parts) if shape is not None]
    return sum(shape[:3].numel() for shape in shapes) / max(sum(shape[1] for shape in shapes), 1)
