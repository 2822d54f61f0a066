"""Shorthand settings that expand one attention into one attention per layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lrsa_lit.bounds import is_integer
from lrsa_lit.errors import UserError

Attention = Mapping[str, Any] | None
"""Changes of a run's own rule, for example ``{top_k: 16}``; None is dense attention."""


def each_layer(field: str, attentions: Mapping[str, Attention]) -> Iterator[tuple[str, Attention]]:
    """Expand each attention NAME whose ``dense_layers`` is a mapping into NAME-0, NAME-1 and so on.

    For NAME-i, ``{only: 30}`` makes only layer i of 30 dense; ``{only: 30, beside: [18]}`` layer i and layer 18;
    ``{all_but: 30}`` all layers except i. ``field`` is the argument that holds the attentions.

    Raises:
        UserError: a mapping has other keys or values.
    """
    for name, changes in attentions.items():
        if changes is None or not isinstance(changes.get("dense_layers"), Mapping):
            yield name, changes
            continue
        for layer, dense in _dense_layers(f"{field}.{name}.dense_layers", changes["dense_layers"]):
            yield f"{name}-{layer}", {**changes, "dense_layers": dense}


def _dense_layers(field: str, given: Mapping[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """Yield each layer i with the list of layers that are dense in NAME-i."""
    if given.keys() not in ({"only"}, {"only", "beside"}, {"all_but"}):
        allowed = "layers, or {only: N} or {all_but: N} for each of N layers, or {only: N, beside: [LAYER, ...]}"
        raise UserError(field, dict(given), allowed)
    kind = "only" if "only" in given else "all_but"
    count, beside = given[kind], given.get("beside", [])
    if not is_integer(count) or count < 1:
        raise UserError(f"{field}.{kind}", count, "an integer >= 1")
    valid = isinstance(beside, list) and all(is_integer(layer) and 0 <= layer < count for layer in beside)
    if not valid or not len(set(beside)) == len(beside) < count:
        raise UserError(f"{field}.beside", beside, f"a list of different layers from 0 to {count - 1}, not all of them")
    for layer in (layer for layer in range(count) if layer not in beside):
        yield layer, [other for other in range(count) if (other == layer) == (kind == "only") or other in beside]
