"""Rows that are decoded together, one token per row and step, even if their lengths differ.

Dimensions: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lrsa_lit.attention import LRSACache, base_of, cache_argument, prefill
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.ops.sparse_attention import KeyValueStream

Key = TypeVar("Key")
_MOST_IDLE = 16
"""The most tokens of the row of a free place: rewinding it in every layer at each token would take host time."""


class Rows(Generic[Key]):
    """A batch of rows. Rows join with the cache of their prompt, and join and leave between two tokens.

    With a CUDA graph, the number of places is a power of two, and each place has memory for the longest row, so that
    one graph serves all rows that join. Without a graph, each row uses the memory that it needs.

    Args:
        model: a model with LRSA enabled.
        graphed: decode with a CUDA graph; None means if the model is on CUDA.
    """

    def __init__(self, model: Any, *, graphed: bool | None = None) -> None:
        self.model = base_of(model)
        self.graphed = self.model.device.type == "cuda" if graphed is None else graphed
        self.clear()

    def clear(self) -> None:
        """Remove all rows."""
        self.cache = LRSACache.of(self.model)
        self._places: list[Key | None] = []
        self._longest: dict[Key, int] = {}
        self._decoder: Decoder | None = None
        self._decodes = (0, 0)

    @property
    def keys(self) -> list[Key]:
        """The keys of the rows, in the order of their logits."""
        return [key for key in self._places if key is not None]

    def places(self, rows: int) -> int:
        """The number of places for ``rows`` rows in all; with a graph, at least the places that exist."""
        return max(len(self._places), 1 << (rows - 1).bit_length()) if self.graphed else rows

    def join(self, key: Key, cache: LRSACache, longest: int) -> None:
        """Move the only row of a cache to this batch. ``longest`` is the most tokens that the row will have in all."""
        if self.graphed and None in self._places:
            place = self._places.index(None)
            self.cache.replace_row(place, cache)
            self._places[place] = key
        else:
            self.cache.append_rows(cache)
            self._places.append(key)
            while self.graphed and len(self._places) & (len(self._places) - 1):
                self.cache.append_rows(self._nobody())
                self._places.append(None)
        self._longest[key] = longest

    def leave(self, key: Key) -> None:
        """Remove a row."""
        del self._longest[key]
        place = self._places.index(key)
        if self.graphed:
            self.cache.replace_row(place, self._nobody())
            self._places[place] = None
        else:
            self.cache.drop_row(place)
            del self._places[place]
        if not self.keys:
            self.clear()

    @torch.no_grad()
    def step(self, tokens: Mapping[Key, int]) -> Tensor:
        """Feed one token per row; returns the next logits (R, V), in the order of :attr:`keys`."""
        given = [[0 if key is None else tokens[key]] for key in self._places]
        ids = torch.tensor(given, device=self.model.device)
        if not self.graphed:
            positions = torch.tensor([[stream.seen] for stream in self.cache.layers[0].streams], device=ids.device)
            past = cache_argument(self.model, self.cache)
            logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=True, **past).logits
            return logits[:, -1]
        self._rewind_free()
        logits = self._decoding().step(ids)
        taken = [place for place, key in enumerate(self._places) if key is not None]
        # A copy either way, because the decoder overwrites its logits.
        return logits[:, -1].clone() if len(taken) == len(self._places) else logits[taken, -1]

    def _rewind_free(self) -> None:
        """Shorten the rows of free places now and then, before they are compressed or leave their memory."""
        most = min(_MOST_IDLE, 2 * self.cache.config.rule.lag_size - 1, max(self._longest.values()) // 2)
        streams = self.cache.layers[0].streams
        worn = [place for place, key in enumerate(self._places) if key is None and streams[place].seen >= most]
        for layer in self.cache.layers if worn else ():
            for place in worn:
                stream = layer.streams[place]
                for part in stream.parts:
                    assert isinstance(part, KeyValueStream)
                    part.rewind()
                stream.seen = 1

    def _decoding(self) -> Decoder:
        longest = 1 << (max(self._longest.values()) - 1).bit_length()
        needed = len(self._places), max(longest, self._decodes[1])
        if self._decoder is None or self._decodes != needed:
            # room=1, because ``longest`` already covers all tokens of every row.
            self._decoder, self._decodes = Decoder(self.model, self.cache, room=1, longest=needed[1]), needed
        return self._decoder

    def _nobody(self) -> LRSACache:
        """A dummy row of one token for a free place."""
        cache = LRSACache.of(self.model)
        prefill(self.model, torch.zeros(1, 1, dtype=torch.int64, device=self.model.device), cache)
        return cache
