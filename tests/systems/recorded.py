"""Recorded runs of published systems (tests/vectors/systems), and prompts that go through a system's stream."""

import json
from pathlib import Path

import torch

from lrsa_lit.ops.sparse_attention import Rotary
from lrsa_lit.systems import Place

ROTARY = Rotary.plain(4)
CALLS = {"at once": [9999], "split": [3, 1, 5, 9999], "one by one": [1] * 99}


def vectors(name):
    return json.loads((Path(__file__).parents[1] / "vectors/systems" / f"{name}.json").read_text())


def inputs(name):
    """query (1, H, G, T, D), key and value (1, H, T, D) as recorded; None for what is not."""
    given = vectors(name)["inputs"]
    found = (torch.tensor(given[x], dtype=torch.float64)[None] if x in given else None for x in "qkv")
    return tuple(found)


def rotated(x):
    return None if x is None else ROTARY.rotate(x, range(x.shape[-2]))


def fed(system, query, key, value=None, *, calls="at once", layer=0):
    """A stream that has taken in a prompt, its keys and queries rotated; those that are missing are zeros."""
    stream = system.stream(Place(layer, ROTARY), "eager")
    query = torch.zeros_like(key)[:, :, None] if query is None else query
    value, start = torch.zeros_like(key) if value is None else value, 0
    for count in CALLS[calls]:
        part = slice(start, start + count)
        if start < key.shape[2]:
            of_call = query[:, :, :, part].flatten(1, 2), key[:, :, part], value[:, :, part]
            with torch.no_grad():
                stream.attend(*of_call, key.shape[3] ** -0.5)
        start += count
    return stream


def cut(system, *tensors, **options):
    """The positions that a system keeps of a prompt, by head."""
    stream = fed(system, *tensors, **options)
    stream.end_prompt()
    return stream.kept[0].tolist()
