"""Token by token: single-token calls replay a CUDA graph instead of launching the model kernel by kernel.

Dimensions: B rows, H key-value heads, Hq query heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.interface import CACHE, LAYOUT
from lrsa_lit.attention.layout import Layout
from lrsa_lit.attention.rules import base_of, cache_argument, cache_of_call, enabled_state
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl, LRSAConfig
from lrsa_lit.ops.sparse_attention.api import implementation
from lrsa_lit.ops.sparse_attention.buffer import Pair, PairBuffer, share_memory
from lrsa_lit.ops.sparse_attention.stream import KeyValueStream

_WARM_UP = 3
"""Steps that launch kernel by kernel before one is captured: what compiles or allocates on first use may not do so
then, and an answer that ends before costs no capture."""
_ROOM = 256
_UNGRAPHED_ROPE = ("dynamic", "longrope")
"""Rotary frequencies that transformers makes anew at some length, for which the host must wait in each forward pass."""
_PLAIN = Layout()

Streams = list[list[KeyValueStream]]
"""Of each layer: the one that its rows share, or one for each row."""


@contextlib.contextmanager
def graphed_decoding(model: Any, cache: LRSACache, *, room: int = _ROOM, fuse: bool = False) -> Iterator[None]:
    """Serve the single-token calls of a block (``model.generate(…, past_key_values=cache)``) by a CUDA graph.

    The tokens of such calls are taken as real ones, whatever the mask, and rows of unequal lengths are served like
    others. All other calls, and those of rows that are empty or that a beam search has just reordered, run as ever. On
    other devices than CUDA all calls do: there is no graph to replay. Models with dynamic or "longrope" rotary
    frequencies, which depend on the length, are served without a graph.

    Args:
        model: a causal language model with LRSA enabled.
        cache: its cache.
        room: new tokens to allocate for ahead, at least 1; more than these only cost another capture.
        fuse: fuse the model's own operations with ``torch.compile`` first, which takes a minute.

    Raises:
        UserError: LRSA is not enabled, or the cache is no :class:`LRSACache`.
    """
    inner = base_of(model)
    if enabled_state(inner) is None or not isinstance(cache, LRSACache):
        raise UserError("model, cache: graphed_decoding needs a model with LRSA enabled and its LRSACache")
    if inner.device.type != "cuda":
        yield
        return
    decoder = Decoder(inner, cache, room=room, fuse=fuse)
    with serving(inner, decoder):
        yield


@contextlib.contextmanager
def serving(model: Any, decoder: Decoder) -> Iterator[None]:
    """Let a decoder answer those calls of the model that it is ready for."""
    own = vars(model).get("forward")
    model.forward = _served(model.forward, decoder, decoder.cache)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _served(plain: Callable[..., Any], decoder: Decoder, cache: LRSACache) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ids: Any = kwargs.get("input_ids")
        single = not args and ids is not None and ids.shape[1] == 1 and cache_of_call(*kwargs.values()) is cache
        if single and decoder.ready(rows=ids.shape[0]):
            logits = decoder.step(ids, kwargs.get("position_ids"))
            return CausalLMOutputWithPast(logits=logits, **cache_argument(decoder.model, cache))  # type: ignore[arg-type]
        output = plain(*args, **kwargs)
        decoder.note_order()
        return output

    return forward


class Decoder:
    """Single-token steps of a model over the preallocated memory of its cache.

    Lengths and positions stand in device tensors, so that one graph serves all tokens. Compressions happen between the
    steps, in the same memory, and at different steps for rows of unequal lengths: each layer has one memory, whose rows
    are filled to lengths of their own. Any other call of the model may come between two steps. The graph is captured
    after a few steps in the same memory.

    Args:
        model: a causal language model with LRSA enabled.
        cache: its cache.
        room: new tokens to allocate for ahead, at least 1.
        fuse: whether ``torch.compile`` fuses the model's own operations.
    """

    def __init__(self, model: Any, cache: LRSACache, *, room: int = _ROOM, fuse: bool = False) -> None:
        self.model, self.cache, self.room = model, cache, room
        self.layers: list[_Slot] = []
        self._alike = _layers_by_rule(cache)
        self._graphable = model.device.type == "cuda" and not _waits_for_lengths(model)
        # A function of the class: a method of its own would leave a decoder, its graph and memory, to the collector.
        self._forward = torch.compile(Decoder._run, dynamic=False) if fuse else Decoder._run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._order: list[KeyValueStream] = []
        self._prepared: list[int] = []

    def ready(self, rows: int) -> bool:
        """Whether the next token of each of ``rows`` rows can be served: in the order noted, none empty, one rule."""
        state, first = enabled_state(self.model), self.cache.layers[0]
        if state is None or state.config != self.cache.config or rows != first.rows or not self.cache.is_idle:
            return False
        return first.streams == self._order and all(stream.buffer is not None for stream in first.streams)

    def note_order(self) -> None:
        """Take note of the rows as they are now: a search that then reorders them will do so again, token by token."""
        # The first layer speaks for all: a note of each would keep a whole cache alive that a search has left behind.
        self._order = list(self.cache.layers[0].streams)

    @torch.no_grad()
    def step(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Take in one token per row, none of which may be empty.

        Args:
            ids: (B, 1).
            position_ids: (B, 1) or (1, 1); by default each token follows those that its row has seen.

        Returns:
            Logits (B, 1, V), overwritten by the next step.
        """
        streams = [layer.streams for layer in self.cache.layers]
        with self.cache.changing():
            self._compress(streams)
            if not self._fits(streams):
                self._prepare(ids, streams)
            self._write(ids, position_ids, streams)
            logits = self._replayed() if self._graphable and self._launched >= _WARM_UP else self._launch()
            for layer in self.cache.layers:
                layer.count(1)
                for stream in layer.streams:
                    stream.count(1)
        return logits

    def _compress(self, streams: Streams) -> None:
        """Compress the rows in which something is due."""
        for layers in self._alike:
            for row, stream in enumerate(streams[layers[0]]):
                if stream.due:
                    for layer in layers:
                        streams[layer][row].advance()

    def _fits(self, streams: Streams) -> bool:
        """Whether all stand in the prepared memory, with a place for the next token."""
        full = any(_buffer(stream).is_full for rows in streams for stream in rows)
        return not full and _addresses(streams) == self._prepared

    def _prepare(self, ids: Tensor, streams: Streams) -> None:
        """Make the tensors that steps write into."""
        # What the old slots hold would not be free for what rows move into.
        self.layers, self._graph, self._launched = [], None, 0
        self._state = torch.zeros(1 + len(self._alike), len(streams[0]), dtype=torch.int64, device=ids.device)
        self._ids, self._position = ids.clone(), self._state.new_zeros(ids.shape)
        self._fills = [_Fill(ends) for ends in self._state[1:]]
        slots: dict[int, _Slot] = {}
        for fill, layers in zip(self._fills, self._alike, strict=True):
            places = max(stream.most_stored(self.room) for stream in streams[layers[0]])
            slots |= {layer: _Slot(_memory(streams[layer], places), fill, streams[layer][0].impl) for layer in layers}
        self.layers = [slots[layer] for layer in range(len(slots))]
        self._prepared = _addresses(streams)

    def _launch(self) -> Tensor:
        self._launched += 1
        return self._forward(self)

    def _replayed(self) -> Tensor:
        """The logits of a graph, which the first call captures."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # Threads that pin the next batches may go on allocating meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._forward(self)
            self._graph = graph
        self._graph.replay()
        return self._logits

    def _write(self, ids: Tensor, position_ids: Tensor | None, streams: Streams) -> None:
        """Hand the token, its positions and the lengths over, these in one copy, for which nobody waits."""
        state = [[stream.seen for stream in streams[0]]]
        state += [[_buffer(stream).length for stream in streams[layers[0]]] for layers in self._alike]
        # Pinned memory that is new each time: the copy of the step before may still be under way.
        host = torch.tensor(state, device="cpu", pin_memory=ids.device.type == "cuda")
        self._state.copy_(host, non_blocking=True)
        self._ids.copy_(ids)
        self._position.copy_(self._state[0, :, None] if position_ids is None else position_ids)

    def _run(self) -> Tensor:
        for fill in self._fills:
            fill.include_new()
        output = self.model.__class__.forward(
            self.model,
            input_ids=self._ids,
            position_ids=self._position,
            use_cache=False,
            logits_to_keep=1,
            **{LAYOUT: _PLAIN, CACHE: self},
        )
        logits: Tensor = output.logits
        return logits


class _Fill:
    """How far the memories of the layers of one rule are filled, on the device.

    Args:
        ends: int64, places of the new tokens: of each row (B,), or of all (1,). The decoder writes it.
    """

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends
        self.rows = torch.arange(len(ends), device=ends.device)
        self.length = torch.zeros_like(ends, dtype=torch.int32)

    def include_new(self) -> None:
        """Count the new tokens among the filled: they see themselves."""
        self.length.copy_(self.ends + 1)

    def put(self, memory: Tensor, new: Tensor) -> None:
        """Write the new tokens (B, H, 1, D) to their places in the memory (B, H, capacity, D)."""
        if len(self.ends) == 1:
            memory.index_copy_(2, self.ends, new)
        else:
            memory[self.rows, :, self.ends] = new[:, :, 0]


class _Slot:
    """The memory of one layer, as the attention sees it: in the place of a cache's layer."""

    def __init__(self, memory: Pair, fill: _Fill, impl: Impl) -> None:
        (self.key, self.value), self.fill, self.impl = memory, fill, impl

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention (B, Hq, 1, D) of one new token per row, which is stored behind those of its row."""
        self.fill.put(self.key, key)
        self.fill.put(self.value, value)
        output: Tensor = implementation(self.impl, query).attend_one(
            query, self.key, self.value, self.fill.length, scale
        )
        return output


def _waits_for_lengths(model: Any) -> bool:
    """Whether the model's rotary frequencies depend on how long the rows are; of one kind, or a dict of kinds."""
    kinds = str([getattr(module, "rope_type", None) for module in model.modules()])
    return any(kind in kinds for kind in _UNGRAPHED_ROPE)


def _layers_by_rule(cache: LRSACache) -> list[list[int]]:
    """The layers of each rule, which hold equally many tokens at any time."""
    layers: dict[LRSAConfig | None, list[int]] = {}
    for index, layer in enumerate(cache.layers):
        layers.setdefault(layer.config, []).append(index)
    return list(layers.values())


def _memory(streams: Sequence[KeyValueStream], places: int) -> Pair:
    """One memory (B, H, ``places`` or more, D) of all rows of a layer."""
    buffers = [_buffer(stream) for stream in streams]
    if len(buffers) > 1:
        return share_memory(buffers, places)
    buffers[0].reserve(places)
    return buffers[0].whole


def _addresses(streams: Streams) -> list[int]:
    return [_buffer(stream).address for rows in streams for stream in rows]


def _buffer(stream: KeyValueStream) -> PairBuffer:
    """Where a row, or all of them, are stored."""
    assert stream.buffer is not None
    return stream.buffer
