"""``generate`` of transformers with systems: a prompt ends where the first token of an answer is taken in."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from lrsa_lit.attention.attached import cache_of_call
from lrsa_lit.attention.cache import LRSACache

_METHOD = "prepare_inputs_for_generation"
"""What transformers calls before each call of the model in ``generate``, and in nothing else."""


def watch(model: Any) -> None:
    """Let ``generate`` of the model tell an LRSACache where its prompts end."""
    prepare: Any = functools.partial(_prepare, model)
    # By which transformers knows the arguments of generate.
    prepare.__signature__ = inspect.signature(getattr(model, _METHOD))
    setattr(model, _METHOD, prepare)


def unwatch(model: Any) -> None:
    """Undo :func:`watch`, if it was done."""
    if getattr(vars(model).get(_METHOD), "func", None) is _prepare:
        delattr(model, _METHOD)


def _prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
    cache = cache_of_call(*args, *kwargs.values())
    if isinstance(cache, LRSACache) and not (cache.prompt_ended or kwargs.get("is_first_iteration")):
        cache.end_prompt()
    return getattr(type(model), _METHOD)(model, *args, **kwargs)
