"""Single-token steps that replay a CUDA graph instead of launching the model's kernels one by one.

Dimensions: B rows, H key-value heads, Hq query heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lrsa_lit.attention.attached import base_of, cache_argument, cache_of_call, enabled_state
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.step_memory import FilledLengths, GroupedMemory, LayerMemory, Places
from lrsa_lit.attention.exact import without_autocast
from lrsa_lit.attention.interface import CACHE, LAYOUT
from lrsa_lit.attention.layout import Layout
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import HeadRules, KeyValueStream, Rule, Stream, advance_together
from lrsa_lit.systems.system import System

_WARM_UP = 3
"""Ordinary steps before the capture, in which nothing may compile or allocate; short answers avoid its cost."""
ROOM = 256
"""New tokens to allocate memory for, if the caller does not say how many there will be."""
_UNGRAPHED_ROPE = ("dynamic", "longrope")
"""Rope types whose frequencies depend on the length: transformers makes the host wait for it in each forward."""
_PLAIN = Layout()

Streams = list[list[KeyValueStream]]
"""For each part of each layer (all heads or a group of them), one stream for all rows or one per row."""


class Decoder:
    """Single-token steps of a model over the preallocated memory of its cache.

    Lengths and positions are in device tensors, so that one graph serves all tokens. Compressions run between the
    steps, in the same memory; rows may have different lengths. Other calls of the model are allowed between two steps.
    The graph is captured after a few steps in the same memory, and rows after a reset are moved there if they fit.

    Args:
        model: as in :func:`graphed_decoding`.
        cache: as in :func:`graphed_decoding`.
        room: as in :func:`graphed_decoding`.
        longest: allocate memory for rows of at least this many tokens.
        fuse: as in :func:`graphed_decoding`.
    """

    def __init__(self, model: Any, cache: LRSACache, *, room: int = ROOM, longest: int = 0, fuse: bool = False) -> None:
        self.model, self.cache, self.room = model, cache, room
        # The memory of each layer of the cache, and of each part of each layer.
        self.layers: list[LayerMemory | GroupedMemory] = []
        self._memories: list[LayerMemory] = []
        # Parts that always hold the same number of tokens, and the capacity to give each of them at once.
        self._parts_of_rules: list[list[int]] = []
        self._places_at_once: list[int] = []
        self._longest = longest
        self._graphable = model.device.type == "cuda" and not _waits_for_lengths(model)
        # An unbound function: a bound method would be a reference cycle, and the graph and its memory would stay
        # allocated until the garbage collector runs.
        self._forward = torch.compile(Decoder._run, dynamic=False) if fuse else Decoder._run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._order: list[Stream] = []
        self._known: list[list[Stream]] = []
        self._streams: Streams = []
        # The tensors of each buffer when it was last moved to the memory: a buffer that grows has others.
        self._prepared: list[tuple[Tensor, ...]] = []

    def ready(self, rows: int) -> bool:
        """Whether :meth:`step` can run: the rows are in the recorded order, none is empty, and the rule is the same.

        The tokens of a prompt that a system selects from are not for it.
        """
        state, first, system = enabled_state(self.model), self.cache.layers[0], self.cache.config.system
        if not (system is None or system.trains or self.cache.prompt_ended):
            return False
        if state is None or state.config != self.cache.config or rows != first.rows or not self.cache.is_idle:
            return False
        return self.cache.graphable and first.streams == self._order and all(stream.seen for stream in first.streams)

    def note_order(self) -> None:
        """Record the current rows. A beam search that reorders them will do so at every token, so it gets no graph."""
        # The first layer is enough. References to all layers would keep a cache alive that a search no longer uses.
        self._order = list(self.cache.layers[0].streams)

    @torch.no_grad()
    def step(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Feed one token per row, ``ids`` (B, 1). No row may be empty.

        Args:
            ids: (B, 1) token ids.
            position_ids: (B, 1) or (1, 1); by default the numbers of tokens that the rows have seen. A system that
                rotates by slots uses these instead.

        Returns:
            Logits (B, 1, V), which the next step overwrites.
        """
        streams = self._current_streams()
        with self.cache.changing():
            self._compress(streams)
            if not self._fits(streams) and not self._reuse(streams):
                self._prepare(ids, streams)
            self._write(ids, position_ids, streams)
            logits = self._replayed() if self._graphable and self._launched >= _WARM_UP else self._launch()
            for layer in self.cache.layers:
                layer.count(1)
                for stream in layer.streams:
                    stream.count(1)
        return logits

    def _current_streams(self) -> Streams:
        """The streams of the cache, listed anew only after rows have come, gone or moved: a token has little time."""
        if self._known != (now := [layer.streams for layer in self.cache.layers]):
            self._known = [list(streams) for streams in now]
            parts = ([stream.parts for stream in streams] for streams in now)
            self._streams = [list(rows) for of_layer in parts for rows in zip(*of_layer, strict=True)]  # type: ignore[arg-type]
            by_kind: dict[_Kind, list[int]] = {}
            for index, kind in enumerate(_kinds_of_parts(self.cache)):
                by_kind.setdefault(kind, []).append(index)
            self._parts_of_rules = list(by_kind.values())
            self._places_at_once = [_at_once(kind, self.room, self._longest) for kind in by_kind]
        return self._streams

    def _compress(self, streams: Streams) -> None:
        for parts in self._parts_of_rules:
            for row, stream in enumerate(streams[parts[0]]):
                if stream.due:
                    with without_autocast():
                        advance_together([streams[part][row] for part in parts])

    def _fits(self, streams: Streams) -> bool:
        """Whether all streams are in the prepared memory, with room for the next token."""
        now = _tensors(streams)
        if len(now) != len(self._prepared) or not all(map(operator.is_, now, self._prepared)):
            return False
        # Parts with the same rule have equally much memory.
        first = (stream for parts in self._parts_of_rules for stream in streams[parts[0]])
        return all(buffer.length < buffer.capacity for stream in first for buffer in stream.buffers)

    def _places(self, streams: Streams) -> list[int]:
        """For each part, the capacity that its rows need for the next tokens."""
        places = [0] * len(streams)
        for parts, at_once in zip(self._parts_of_rules, self._places_at_once, strict=True):
            needed = max(at_once, *(stream.most_stored(self.room) for stream in streams[parts[0]]))
            for part in parts:
                places[part] = needed
        return places

    def _reuse(self, streams: Streams) -> bool:
        """Move rows into the prepared memory; False if it is too small or was made for other shapes."""
        together = list(zip(self._memories, streams, self._places(streams), strict=False))
        if not together or not all(memory.can_hold(rows, places) for memory, rows, places in together):
            return False
        for memory, rows, _ in together:
            memory.take(rows)
        self._prepared = _tensors(streams)
        if torch.is_autocast_enabled(self.model.device.type):
            # The graph reads converted weights that autocast freed at the end of its block.
            self._graph, self._launched = None, 0
        return True

    def _prepare(self, ids: Tensor, streams: Streams) -> None:
        # Release the old memory first, so that the new one can use it.
        self.layers, self._memories, self._prepared, self._graph, self._launched = [], [], [], None, 0
        rules = len(self._parts_of_rules)
        self._state = torch.zeros(1 + 2 * rules, len(streams[0]), dtype=torch.int64, device=ids.device)
        self._ids, self._position = ids.clone(), self._state.new_zeros(ids.shape)
        self._filled = [FilledLengths(ends) for ends in self._state[1 : 1 + rules]]
        places = zip(self._filled, map(Places, self._state[1 + rules :]), strict=True)
        of_part = {part: pair for pair, parts in zip(places, self._parts_of_rules, strict=True) for part in parts}
        self._memories = [
            LayerMemory(rows, count, *of_part[part])
            for part, (rows, count) in enumerate(zip(streams, self._places(streams), strict=True))
        ]
        memories = iter(self._memories)
        for layer in self.cache.layers:
            groups = layer.streams[0].groups
            self.layers.append(next(memories) if groups is None else GroupedMemory(groups, memories))
        self._prepared = _tensors(streams)

    def _launch(self) -> Tensor:
        self._launched += 1
        return self._forward(self)

    def _replayed(self) -> Tensor:
        """The logits from replaying the graph, which the first call captures."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads that pin the next batches may allocate during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._forward(self)
            self._graph = graph
        self._graph.replay()
        return self._logits

    def _write(self, ids: Tensor, position_ids: Tensor | None, streams: Streams) -> None:
        """Copy tokens, positions and lengths to the device; the lengths in one copy that does not block the host."""
        state = [[stream.position for stream in streams[0]]]
        state += [[stream.buffer.length for stream in streams[parts[0]]] for parts in self._parts_of_rules]
        state += [[stream.query_place for stream in streams[parts[0]]] for parts in self._parts_of_rules]
        # New pinned memory each time, because the previous copy may still be running.
        host = torch.tensor(state, device="cpu", pin_memory=ids.device.type == "cuda")
        self._state.copy_(host, non_blocking=True)
        self._ids.copy_(ids)
        by_slot = self.cache.config.system is not None and self.cache.config.system.rotates_by_slot
        self._position.copy_(self._state[0, :, None] if position_ids is None or by_slot else position_ids)

    def _run(self) -> Tensor:
        for filled in self._filled:
            filled.include_new()
        given = {"input_ids": self._ids, "position_ids": self._position, LAYOUT: _PLAIN, CACHE: self}
        output = self.model.__class__.forward(self.model, use_cache=False, logits_to_keep=1, **given)
        logits: Tensor = output.logits
        return logits


@contextlib.contextmanager
def graphed_decoding(model: Any, cache: LRSACache, *, room: int = ROOM, fuse: bool = False) -> Iterator[None]:
    """Serve the single-token calls of a block (``model.generate(…, past_key_values=cache)``) with a CUDA graph.

    The tokens of these calls count as real, whatever the mask; rows may have unequal lengths. The model runs as usual
    for all other calls, for rows that are empty or were just reordered by a beam search, and on other devices than
    CUDA. Models whose rotary frequencies depend on the length ("dynamic", "longrope") are served without a graph.

    Args:
        model: a causal language model with LRSA enabled.
        cache: its cache.
        room: new tokens to allocate memory for, at least 1. Longer answers only cost another capture.
        fuse: first fuse the model's own operations with ``torch.compile``, which takes a minute.

    Raises:
        UserError: LRSA is not enabled, or the cache is not an :class:`LRSACache`.
    """
    inner = base_of(model)
    if enabled_state(inner) is None or not isinstance(cache, LRSACache):
        raise UserError("model, cache", reason="graphed_decoding needs a model with LRSA enabled and its LRSACache")
    if inner.device.type != "cuda":
        yield
        return
    with serving(inner, Decoder(inner, cache, room=room, fuse=fuse)):
        yield


@contextlib.contextmanager
def serving(model: Any, decoder: Decoder) -> Iterator[None]:
    """In a with block, let the decoder answer the calls of the model that it is ready for."""
    own, plain, cache = vars(model).get("forward"), model.forward, decoder.cache

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

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _tensors(streams: Streams) -> list[tuple[Tensor, ...]]:
    """The tensors of all buffers; comparing these tuples by identity is faster than asking torch for addresses."""
    return [buffer.whole for rows in streams for stream in rows for buffer in stream.buffers]


class _Kind(NamedTuple):
    """What determines how many tokens a part of a layer holds: all parts of a kind hold equally many.

    Attributes:
        rule: its rule, if it has no system.
        system: its system.
        part: the part's own number, if its system keeps another number of tokens in each.
    """

    rule: Rule | None
    system: System | None
    part: int | None = None


def _kinds_of_parts(cache: LRSACache) -> Iterator[_Kind]:
    """The kind of each part of each layer."""
    numbers = itertools.count()
    for index, layer in enumerate(cache.layers):
        system = cache.config.layers.system_of(index)
        parts = layer.streams[0].parts
        if system is not None and system.rows_differ:
            yield from (_Kind(None, system, next(numbers)) for _ in parts)
        else:
            rules = layer.rule.rules if isinstance(layer.rule, HeadRules) else (layer.rule,)
            yield from (_Kind(rule, system) for rule in rules)


def _at_once(kind: _Kind, room: int, longest: int) -> int:
    """The capacity for rows of ``longest`` tokens; with a system, for what it keeps of them and ``room`` more."""
    if kind.system is None or not longest:
        return KeyValueStream(kind.rule).most_stored(longest)
    # A part may keep more than the mean, and less in one prompt than in the next.
    return longest if kind.system.rows_differ else math.ceil(kind.system.held(longest)) + room


def _waits_for_lengths(model: Any) -> bool:
    """Whether the model's rotary frequencies depend on the length of the rows."""
    # ``rope_type`` is one kind or a dict of kinds.
    kinds = str([getattr(module, "rope_type", None) for module in model.modules()])
    return any(kind in kinds for kind in _UNGRAPHED_ROPE)
