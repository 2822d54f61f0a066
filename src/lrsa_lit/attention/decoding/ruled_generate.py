"""``generate`` of transformers under a model's rule, from a compressed cache: what a folder's custom_generate calls."""

from __future__ import annotations

from typing import Any

import torch

from lrsa_lit.attention.attached import base_of, cache_argument, cache_of_call, given_or_stored
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.decoder import ROOM, graphed_decoding
from lrsa_lit.attention.interface import enabled_config, using


@torch.no_grad()
def generate_under_rule(model: Any, *inputs: Any, **arguments: Any) -> Any:
    """What ``model.generate(*inputs, **arguments)`` returns, under the model's rule and from an LRSACache.

    On CUDA a graph serves the tokens. Afterwards the model attends as it did before.

    Args:
        model: a causal language model that LRSA is enabled on, or whose ``config.json`` holds a rule.
        inputs: arguments of ``generate``.
        arguments: arguments of ``generate``. A cache among them is used; without one, an empty LRSACache is made,
            unless ``use_cache`` is false.

    Raises:
        UserError: the model has no rule, or one that does not suit it.
    """
    inner = base_of(model)
    rule = enabled_config(inner)
    if rule is None:
        # Where transformers alone has loaded factors of low rank, it has made whole projections of them.
        rule = given_or_stored(None, inner).replace(latents=False)
    # The instance's own attribute may be what has called this function.
    generate = type(inner).generate
    with using(inner, rule):
        if cache_of_call(*arguments.values()) is not None or arguments.get("use_cache") is False:
            return generate(inner, *inputs, **arguments)
        cache = LRSACache.of(inner)
        with graphed_decoding(inner, cache, room=_room(inner, arguments)):
            return generate(inner, *inputs, **arguments | cache_argument(inner, cache))


def _room(model: Any, arguments: dict[str, Any]) -> int:
    """New tokens to expect, as far as anybody says."""
    config = arguments.get("generation_config") or model.generation_config
    most = arguments.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    return most if isinstance(most, int) and most > 0 else ROOM
