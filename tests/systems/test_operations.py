"""The operations that a batch costs, and when the host waits: a GPU is idle if these grow with rows and layers."""

import functools

import pytest
import torch
from systems.test_decoding import SYSTEMS
from torch.utils._python_dispatch import TorchDispatchMode

from lrsa_lit.attention import LRSACache, LRSAConfig, prefill, read_prompts, using
from lrsa_lit.attention.decoding import Decoder
from lrsa_lit.systems import (
    TOVA,
    AdaKV,
    Cascade,
    ChunkKV,
    ChunkKVPress,
    ExpectedAttention,
    FreqKV,
    KeyDiff,
    KeyDiffBlocks,
    KeyNorm,
    LagKVPress,
    SnapKV,
    SqueezedAttention,
)

SCORED = [TOVA(), ExpectedAttention(), KeyDiff(), LagKVPress(lag_size=4), SnapKV(window=3)]
DECODED = [
    *{type(system): system for system in [*SCORED, *SYSTEMS[::-1]]}.values(),
    Cascade(window=3, caches=3, sink_size=2, stride=5), SqueezedAttention(observed=6, clusters=0.3),
    SqueezedAttention(observed=6, clusters=0.3, coarse=0.1),
]  # fmt: skip


WAITING = {"_local_scalar_dense", "_unique2", "equal", "masked_select", "nonzero", "unique_consecutive", "unique_dim"}
"""Operations whose results, or the shapes of whose results, the host needs before it can go on."""


class Counted(TorchDispatchMode):
    """Counts operations in a with block, and for how many of them the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        self.operations += 1
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        self.waits += name in WAITING or by_mask or unsized
        return func(*args, **kwargs)


def refuse_copies(patch):
    """Copies to the host that are no operations on a CPU fail."""

    def refuse(_, name, *given):
        pytest.fail(f"{name} makes the host wait")

    for name in ("cpu", "numpy", "tolist"):
        patch.setattr(torch.Tensor, name, functools.partialmethod(refuse, name))


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
    "system",
    [*SCORED, AdaKV(scorer=KeyNorm()), ChunkKV(0.5, size=3, window=2, reuse=2)],
    ids=lambda system: type(system).__name__,
)
def test_the_cuts_of_unequal_rows_make_the_host_wait_once(system, model, ids, monkeypatch):
    """All rows are copied to the host together, and each keeps what it keeps alone."""
    prompt, begins, fetch, fetched = ids(4, 31), (0, 7, 2, 12), torch.Tensor.cpu, []
    mask = (torch.arange(31) >= torch.tensor(begins)[:, None]).long()

    def kept(prompt, mask):
        cache = LRSACache.of(model)
        prefill(model, prompt * mask, cache, attention_mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", lambda tensor: fetched.append(tensor) or fetch(tensor))
            cache.end_prompt()
        return [[stream.kept for stream in layer.streams] for layer in cache.layers]

    with using(model, LRSAConfig(system=system)), torch.no_grad():
        together = kept(prompt, mask)
        assert len(fetched) == 1
        for row, begin in enumerate(begins):
            alone = kept(prompt[row : row + 1, begin:], mask[row : row + 1, begin:])
            for layer, (own,) in zip(together, alone, strict=True):
                assert layer[row].equal(own)


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


def decoded(model, ids, system, rows):
    """What a single token costs, once the memory is prepared: with a decoder where a graph is possible."""
    prompt, mask = ids(rows, 31), (torch.arange(31) >= torch.arange(rows)[:, None]).long()
    with using(model, LRSAConfig(system=system)), torch.no_grad():
        cache = LRSACache.of(model)
        read_prompts(model, cache, prompt * mask, mask, encode=lambda text: [3, 4])
        step = Decoder(model, cache, room=5).step if cache.graphable else lambda token: prefill(model, token, cache)
        step(prompt[:, :1])
        with pytest.MonkeyPatch.context() as patch, Counted() as counted:
            refuse_copies(patch)
            step(prompt[:, :1])
        return counted


def of_name(system):
    return type(system).__name__


@pytest.mark.parametrize("system", DECODED, ids=of_name)
def test_a_decoded_token_costs_no_more_for_more_rows(system, model, ids):
    assert decoded(model, ids, system, 2).operations == decoded(model, ids, system, 4).operations


@pytest.mark.parametrize("system", DECODED, ids=of_name)
def test_a_decoded_token_does_not_make_the_host_wait(system, model, ids):
    """But for lists of what Squeezed Attention reads in each layer, whose time falls with their lengths."""
    layers = len(model.model.layers) if isinstance(system, SqueezedAttention) else 0
    assert decoded(model, ids, system, 3).waits == layers


@pytest.mark.parametrize(
    "system", [KeyDiffBlocks(9, block=2), FreqKV(9, sink_size=2), Cascade(window=3, caches=2, sink_size=2, stride=3)],
    ids=of_name,
)  # fmt: skip
def test_rows_go_through_the_parts_of_a_prompt_together(system, model, ids):
    """A further row costs about as much as one more part, wherever it ends."""

    def of_prompt(rows):
        mask = (torch.arange(60) >= torch.arange(rows)[:, None]).long()
        with using(model, LRSAConfig(system=system)), torch.no_grad(), Counted() as counted:
            prefill(model, ids(rows, 60) * mask, LRSACache.of(model), attention_mask=mask)
        return counted.operations

    assert of_prompt(8) < 2 * of_prompt(1)
