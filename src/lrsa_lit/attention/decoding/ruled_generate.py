"""``generate`` with a model's rule and a compressed cache; called by the custom_generate of a saved model folder."""

from __future__ import annotations

from typing import Any

import torch

from lrsa_lit.attention.attached import base_of, cache_argument, cache_of_call, given_or_stored
from lrsa_lit.attention.cache import LRSACache
from lrsa_lit.attention.decoding.decoder import ROOM, graphed_decoding
from lrsa_lit.attention.interface import enabled_config, using


@torch.no_grad()
def generate_under_rule(model: Any, *inputs: Any, **arguments: Any) -> Any:
    """Run ``model.generate(*inputs, **arguments)`` with the model's rule and an LRSACache.

    On CUDA, a graph decodes the tokens. Afterwards the model's attention is restored.

    Args:
        model: a causal language model with LRSA enabled, or with a rule in its ``config.json``.
        inputs: arguments of ``generate``.
        arguments: keyword arguments of ``generate``. If they contain no cache, an empty LRSACache is made, unless
            ``use_cache`` is false.

    Raises:
        UserError: the model has no rule, or the rule does not fit it.
    """
    inner = base_of(model)
    rule = enabled_config(inner)
    if rule is None:
        # Latents need low-rank projections, and transformers alone loads them as whole projections.
        rule = given_or_stored(None, inner).replace(latents=False)
    # From the class, because the instance may have a ``generate`` that calls this function.
    generate = type(inner).generate
    with using(inner, rule):
        if cache_of_call(*arguments.values()) is not None or arguments.get("use_cache") is False:
            return generate(inner, *inputs, **arguments)
        cache = LRSACache.of(inner)
        with graphed_decoding(inner, cache, room=_room(inner, arguments)):
            return generate(inner, *inputs, **arguments | cache_argument(inner, cache))


def _room(model: Any, arguments: dict[str, Any]) -> int:
    """The number of new tokens to expect, from the arguments or the generation config."""
    config = arguments.get("generation_config") or model.generation_config
    most = arguments.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    return most if isinstance(most, int) and most > 0 else ROOM
