"""Systems in transformers' ``generate``: the prompt ends when the first token of an answer is fed to the model."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from lrsa_lit.attention.attached import cache_of_call
from lrsa_lit.attention.cache import LRSACache

_METHOD = "prepare_inputs_for_generation"
"""The method that ``generate``, and nothing else in transformers, calls before each call of the model."""


def watch(model: Any) -> None:
    """Make the model's ``generate`` call :meth:`LRSACache.end_prompt` at the end of its prompts."""
    prepare: Any = functools.partial(_prepare, model)
    # transformers derives the allowed arguments of generate from this signature.
    prepare.__signature__ = inspect.signature(getattr(model, _METHOD))
    setattr(model, _METHOD, prepare)


def unwatch(model: Any) -> None:
    """Undo :func:`watch`. Does nothing if the model is not watched."""
    if getattr(vars(model).get(_METHOD), "func", None) is _prepare:
        delattr(model, _METHOD)


def _prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
    cache = cache_of_call(*args, *kwargs.values())
    if isinstance(cache, LRSACache) and not (cache.prompt_ended or kwargs.get("is_first_iteration")):
        cache.end_prompt()
    return getattr(type(model), _METHOD)(model, *args, **kwargs)
