"""Single tokens in the preallocated memory of a decoder: what systems answer without it."""

import contextlib

import pytest
import torch

from lrsa_lit.attention import LRSACache, LRSAConfig, prefill, read_prompts, single_token_steps, using
from lrsa_lit.attention.decoding import Decoder, serving
from lrsa_lit.systems import (
    AdaKV,
    ChunkKV,
    ChunkKVPress,
    FreqKV,
    KeyDiffBlocks,
    KeyNorm,
    KVzip,
    SnapKV,
    SparseAccelerate,
)

SYSTEMS = [
    AdaKV(0.3, scorer=KeyNorm()), AdaKV(pairs=1, alpha=0.0, scorer=KeyNorm()), ChunkKV(0.5, size=3, window=2),
    ChunkKVPress(0.5, scorer=KeyNorm(), size=7), KVzip(0.4, chunk=16), KVzip(pairs=1, sink_size=0, chunk=9),
    FreqKV(12, sink_size=2), FreqKV(41, sink_size=0), FreqKV(5, sink_size=4, gamma=0.0), KeyDiffBlocks(9, block=4),
    SparseAccelerate(local=3, diagonals=3),
]  # fmt: skip


@pytest.mark.parametrize("pads", [0, 13], ids=["equal", "unequal"])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)
def test_a_decoder_answers_as_the_model_does(system, pads, model, ids):
    """Two batches in one memory, of which the second has longer prompts."""
    config = LRSAConfig(system=system, dense_layers=() if system.rotates_by_slot else (1,))
    with using(model, config), torch.no_grad():
        plain, fast = (LRSACache.of(model) for _ in range(2))
        assert plain.graphable
        steps = (plain, single_token_steps(model, plain)), (fast, Decoder(model, fast, room=3, longest=50).step)
        for length, tokens in ((31, 9), (40, 4)):
            prompt, answer = ids(2, length), ids(2, tokens)
            mask = (torch.arange(length) >= torch.tensor([[0], [pads]])).long()
            logits = []
            for cache, step in steps:
                cache.reset()
                read_prompts(model, cache, prompt * mask, mask, encode=lambda text: [3, 4])
                logits.append(torch.stack([step(answer[:, at, None]).clone() for at in range(tokens)]))
            # The model's own rotation is in float32, and plain steps turn it back and to the slot.
            torch.testing.assert_close(*logits, rtol=0, atol=1e-5 if system.rotates_by_slot else 1e-8)
            assert plain.measured(2) == fast.measured(2)


def test_dense_layers_beside_slots_are_answered_without_a_graph(model):
    """The model rotates a token alike in all layers."""
    for dense_layers, graphable in (((), True), ((1,), False)):
        with using(model, LRSAConfig(system=FreqKV(12), dense_layers=dense_layers)):
            assert LRSACache.of(model).graphable is graphable


@pytest.mark.parametrize(
    "system", [SnapKV(0.3, window=3), AdaKV(0.3, scorer=SnapKV(window=3))], ids=lambda system: type(system).__name__
)
def test_a_last_token_of_a_prompt_by_itself_counts_as_the_prompt(system, model, ids):
    """A decoder would store its key and value alone, but the selection also needs its query."""
    prompt, answer = ids(2, 30), ids(2, 5)
    with using(model, LRSAConfig(system=system)), torch.no_grad():
        logits = []
        for decodes in (False, True):
            cache = LRSACache.of(model)
            with serving(model, Decoder(model, cache)) if decodes else contextlib.nullcontext():
                prefill(model, prompt[:, :29], cache)
                prefill(model, prompt[:, 29:], cache)
                cache.end_prompt()
                logits.append([prefill(model, answer[:, at, None], cache).clone() for at in range(5)])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-8)
