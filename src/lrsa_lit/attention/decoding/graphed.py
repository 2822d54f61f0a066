"""``model.generate`` whose single-token calls replay a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from lrsa_lit.attention.attached import base_of, cache_argument, cache_of_call, enabled_state
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.decoder import ROOM, Decoder
from lrsa_lit.errors import UserError


@contextlib.contextmanager
def graphed_decoding(model: Any, cache: LRSACache, *, room: int = ROOM, fuse: bool = False) -> Iterator[None]:
    """Serve the single-token calls of a block (``model.generate(…, past_key_values=cache)``) by a CUDA graph.

    The tokens of such calls are taken as real ones, whatever the mask; rows may be of unequal lengths. All other calls,
    those of rows that are empty or that a beam search has just reordered, and all on other devices than CUDA run as
    ever. Models with dynamic or "longrope" rotary frequencies, which depend on the length, are served without a graph.

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
        raise UserError("model, cache", reason="graphed_decoding needs a model with LRSA enabled and its LRSACache")
    if inner.device.type != "cuda":
        yield
        return
    with serving(inner, Decoder(inner, cache, room=room, fuse=fuse)):
        yield


@contextlib.contextmanager
def serving(model: Any, decoder: Decoder) -> Iterator[None]:
    """Let a decoder answer those calls of the model that it is ready for."""
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
