"""Checks around each call of a model with stock attention that uses a compressed cache as an ordinary past."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lrsa_lit.attention.attached import arguments_by_name, cache_of_call, enabled_state, tokens_of_call
from lrsa_lit.attention.layout import checked_mask
from lrsa_lit.errors import UserError


class Lease:
    """A cache and its copies share a lease on their model. When the last of them is freed, the hooks are removed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled cache belongs to no model after loading.
        return type(None), ()


def lease(decoder: nn.Module) -> Lease:
    """A lease for caches of this decoder. From now on, calls of the decoder with such a cache are checked."""
    held = Lease()
    watch = _Watch(held)
    for handle in (
        decoder.register_forward_pre_hook(watch.before, with_kwargs=True),
        decoder.register_forward_hook(watch.after, with_kwargs=True),
    ):
        weakref.finalize(held, handle.remove)
    return held


class _Watch:
    """Hooks that refuse calls which would silently break the rule. Copies of the model share them, pickles do not."""

    def __init__(self, held: Lease | None) -> None:
        self._lease = None if held is None else weakref.ref(held)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, (None,)

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs, begin a call of its cache."""
        given = arguments_by_name(decoder, args, kwargs)
        cache: Any = cache_of_call(*given.values())
        # If LRSA has been enabled on the model since, that hook begins the call.
        if not self._serves(cache) or enabled_state(decoder) is not None:
            return
        tokens = tokens_of_call(given)
        if tokens is None:
            return
        rows, length = tokens.shape[:2]
        mask = given.get("attention_mask")
        if mask is not None and checked_mask(mask, (rows, cache.get_seq_length() + length)) is not None:
            reason = "with stock attention, LRSACache does not support pads; call enable(model, …)"
            raise UserError("attention_mask", reason=reason)
        cache.begin(None, rows)

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder ran, end the call, unless the hook of an enabled model has ended it."""
        cache: Any = cache_of_call(*args, *kwargs.values())
        if self._serves(cache) and not cache.is_idle:
            cache.end()

    def _serves(self, cache: Any) -> bool:
        held = getattr(cache, "lease", None)
        return self._lease is not None and held is not None and self._lease() is held
