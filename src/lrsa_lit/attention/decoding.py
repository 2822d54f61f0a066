"""Token by token: single-token calls replay a CUDA graph instead of launching the model kernel by kernel."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.interface import CACHE, LAYOUT
from lrsa_lit.attention.layout import Layout
from lrsa_lit.attention.rules import base_of, enabled_state
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Impl
from lrsa_lit.ops.sparse_attention.api import implementation
from lrsa_lit.ops.sparse_attention.buffer import Pair

_WARM_UP = 3
_ROOM = 256
_PLAIN = Layout()


@contextlib.contextmanager
def graphed_decoding(model: Any, cache: LRSACache, *, room: int = _ROOM, fuse: bool = False) -> Iterator[None]:
    """Serve the single-token calls of a block (``model.generate(…, past_key_values=cache)``) by a CUDA graph.

    The tokens of such calls are taken as real ones, whatever the mask. All other calls, and those of rows of unequal
    lengths or that a beam search has just reordered, run as ever. On other devices than CUDA all calls do: there is no
    graph to replay.

    Args:
        model: a causal language model with LRSA enabled.
        cache: its cache.
        room: new tokens to allocate for ahead; more than these only cost another capture.
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
        single = not args and ids is not None and ids.shape[1] == 1 and kwargs.get("past_key_values") is cache
        if not single or not decoder.ready():
            return plain(*args, **kwargs)
        return CausalLMOutputWithPast(logits=decoder.step(ids), past_key_values=cache)

    return forward


class Decoder:
    """Single-token steps of a model over the preallocated rows of its cache.

    Lengths and position stand in device tensors, so that one graph serves all tokens. Compressions happen between the
    steps, in the same memory.

    Args:
        model: a causal language model with LRSA enabled.
        cache: its cache.
        room: new tokens to allocate for ahead.
        fuse: whether ``torch.compile`` fuses the model's own operations.
    """

    def __init__(self, model: Any, cache: LRSACache, *, room: int = _ROOM, fuse: bool = False) -> None:
        self.model, self.cache, self.room = model, cache, room
        self.layers: list[_Slot] = []
        self._forward = torch.compile(self._run, dynamic=False) if fuse else self._run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen: list[int] = []
        self._prepared: list[int] = []

    def ready(self) -> bool:
        """Whether the next token can be served: rows of one length, in the memory of the last call, under one rule."""
        state = enabled_state(self.model)
        if state is None or state.config != self.cache.config:
            return False
        if any(layer.stream is None or layer.stream.buffer is None for layer in self.cache.layers):
            return False
        before, self._seen = self._seen, self._addresses()
        return before == self._seen

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Take in one token per row.

        Args:
            ids: (B, 1).

        Returns:
            Logits (B, 1, V), overwritten by the next step.
        """
        streams = self._streams()
        for stream in streams:
            stream.advance()
            if stream.buffer.length == stream.buffer.capacity:
                stream.buffer.reserve(stream.buffer.length + self.room)
        self._seen = self._addresses()
        if self._seen != self._prepared or ids.shape != self._ids.shape:
            self._prepare(ids, streams)
            self._prepared = self._seen
        self._write(ids, streams)
        if self._graph is None:
            self._logits = self._forward()
        else:
            self._graph.replay()
        for layer, stream in zip(self.cache.layers, streams, strict=True):
            stream.count(1)
            layer.count(1)
        return self._logits

    def _streams(self) -> list[Any]:
        return [layer.stream for layer in self.cache.layers]

    def _addresses(self) -> list[int]:
        return [stream.buffer.address for stream in self._streams()]

    def _prepare(self, ids: Tensor, streams: list[Any]) -> None:
        """Make the tensors that steps write into and, on CUDA, capture the graph that reads them."""
        self._ids, self._position = ids.clone(), ids.new_zeros(1, 1)
        self._fills = {stream.rule: _Fill(ids.device) for stream in streams}
        self.layers = [_Slot(stream.buffer.whole, self._fills[stream.rule], stream.impl) for stream in streams]
        self._graph = None
        if ids.device.type != "cuda":
            return
        self._write(ids, streams)
        # Nothing that the warm-up and the capture write counts before a step says so.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward()
        self._graph = graph

    def _write(self, ids: Tensor, streams: list[Any]) -> None:
        self._ids.copy_(ids)
        self._position.fill_(streams[0].seen)
        for stream in {stream.rule: stream for stream in streams}.values():
            self._fills[stream.rule].set(stream.buffer.length)

    def _run(self) -> Tensor:
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
    """How far the buffers of the layers of one rule are filled, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)

    def set(self, rows: int) -> None:
        """The next token goes to row ``rows`` and sees the rows up to itself."""
        self.row.fill_(rows)
        self.length.fill_(rows + 1)


class _Slot:
    """The buffer of one layer, as the attention sees it: in the place of a cache's layer."""

    def __init__(self, rows: Pair, fill: _Fill, impl: Impl) -> None:
        (self.key, self.value), self.fill, self.impl = rows, fill, impl

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention (B, Hq, 1, D) of one new token, which is stored behind the filled rows."""
        self.key.index_copy_(2, self.fill.row, key)
        self.value.index_copy_(2, self.fill.row, value)
        output: Tensor = implementation(self.impl, query).attend_one(
            query, self.key, self.value, self.fill.length, scale
        )
        return output
