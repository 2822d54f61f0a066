"""The operations that a batch costs: a GPU waits for the host if these grow with rows and layers."""

import pytest
import torch
from systems.test_decoding import SYSTEMS
from torch.utils._python_dispatch import TorchDispatchMode

from lrsa_lit.attention import LRSACache, LRSAConfig, prefill, read_prompts, using
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.systems import TOVA, ChunkKV, ChunkKVPress, ExpectedAttention, KeyDiff, KeyNorm, LagKVPress, SnapKV

SCORED = [TOVA(), ExpectedAttention(), KeyDiff(), LagKVPress(lag_size=4), SnapKV(window=3)]


class Counted(TorchDispatchMode):
    """Counts operations in a with block."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def of_cut(model, prompt, system, dense_layers=()):
    """The operations of the end of a prompt."""
    with using(model, LRSAConfig(system=system, dense_layers=dense_layers)), torch.no_grad():
        cache = LRSACache.of(model)
        prefill(model, prompt, cache)
        with Counted() as counted:
            cache.end_prompt()
        return counted.operations


@pytest.mark.parametrize("system", SCORED, ids=lambda system: type(system).__name__)
def test_a_cut_costs_no_more_for_more_rows(system, model, ids):
    assert of_cut(model, ids(1, 30), system) == of_cut(model, ids(4, 30), system)


@pytest.mark.parametrize(
    "system", [*SCORED, ChunkKV(0.5, size=3, window=2), ChunkKVPress(0.5, size=3, scorer=KeyNorm())],
    ids=lambda system: type(system).__name__,
)  # fmt: skip
def test_layers_are_scored_at_once(system, model, ids):
    """A further layer only costs what the copies of its pairs do, which have the same cost after other scores."""
    prompt = ids(1, 30)

    def of_a_further_layer(system):
        return of_cut(model, prompt, system) - of_cut(model, prompt, system, dense_layers=(1,))

    assert of_a_further_layer(system) <= of_a_further_layer(KeyNorm())


@pytest.mark.parametrize(
    "system", {type(system): system for system in SYSTEMS[::-1]}.values(), ids=lambda system: type(system).__name__
)
def test_a_decoded_token_costs_no_more_for_more_rows(system, model, ids):
    found = []
    for rows in (2, 4):
        prompt, mask = ids(rows, 31), (torch.arange(31) >= torch.arange(rows)[:, None]).long()
        with using(model, LRSAConfig(system=system)), torch.no_grad():
            cache = LRSACache.of(model)
            read_prompts(model, cache, prompt * mask, mask, encode=lambda text: [3, 4])
            decoder = Decoder(model, cache, room=3)
            decoder.step(prompt[:, :1])
            with Counted() as counted:
                decoder.step(prompt[:, :1])
            found.append(counted.operations)
    assert found[0] == found[1]
