"""Prompts that are conversations: what is read later is read behind a first turn that has ended."""

import pytest
import torch

from lrsa_lit.attention import Greedy, LRSACache, LRSAConfig, enable, prefill, read_prompts
from lrsa_lit.attention.decoding import Decoder, greedy
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.systems import AdaKV, ChunkKVPress, KeyDiff, KeyNorm, KVzip, SnapKV, SqueezedAttention, StreamingLLM

RULE = LRSAConfig(sink_size=2, lag_size=8, top_k=3)
LENGTHS = (61, 30, 47)
FIRSTS = (40, 30, 33)


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


@pytest.fixture(params=[False, True], ids=["plain", "decoder"])
def prepared(request, monkeypatch):
    """With and without the memory that CUDA graphs need."""
    if request.param:
        steps = lambda model, cache, **sizes: Decoder(model, cache, **sizes).step  # noqa: E731
        monkeypatch.setattr(greedy, "single_token_steps", steps)


def test_a_rule_knows_no_turns(prepared):
    """It compresses while it reads, so that later questions never change what is kept of the context."""
    model = enable(tiny_model().eval(), RULE)
    ids, mask = batch()
    together = Greedy(model, [2], max_new_tokens=12)(ids, mask, FIRSTS)
    assert together == Greedy(model, [2], max_new_tokens=12)(ids, mask)


CUTTING = [
    SnapKV(0.3, window=4), StreamingLLM(0.2, sink_size=2), AdaKV(0.3, scorer=KeyNorm()),
    AdaKV(pairs=2, alpha=0.0, scorer=KeyDiff()), ChunkKVPress(0.4, scorer=KeyNorm(), size=7),
    KVzip(0.4, chunk=16),
]  # fmt: skip
"""From the third on, each head or row of each layer keeps another number of pairs."""


@pytest.mark.parametrize("longest", [0, max(LENGTHS)])
@pytest.mark.parametrize("system", CUTTING, ids=lambda system: type(system).__name__)
def test_answers_are_those_of_each_conversation_alone(system, longest, prepared):
    model = enable(tiny_model().eval(), RULE.replace(system=system))
    ids, mask = batch()
    answers = Greedy(model, [2], max_new_tokens=12, longest_prompt=longest, encode=lambda text: list(text.encode()[:3]))
    together = answers(ids, mask, FIRSTS)
    assert [row.tokens for row in answers.usage.rows] == [2 * length for length in LENGTHS]  # in two layers
    for row, (length, first) in enumerate(zip(LENGTHS, FIRSTS, strict=True)):
        assert answers(ids[row : row + 1, -length:], None, [first]) == [together[row]]


def test_a_system_cuts_the_first_turn_alone():
    model = enable(tiny_model().eval(), RULE.replace(system=StreamingLLM(0.5)))
    ids, _ = batch()
    cache = LRSACache.of(model)
    read_prompts(model, cache, ids[:1], first_turns=[40])
    assert cache.stored_tokens() == [20 + 21, 20 + 21]
    cut_at_the_end = LRSACache.of(model)
    read_prompts(model, cut_at_the_end, ids[:1], first_turns=[61])
    assert cut_at_the_end.stored_tokens() == [30, 30]


@pytest.mark.parametrize("system", [KeyDiff(pairs=25), SqueezedAttention(observed=9)])
def test_processes_are_called_equally_often_for_questions(system, monkeypatch):
    """One whose prompts have no more than their contexts reads pads where others have a question and later turns."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda most, op=None: most.fill_(3))
    model = enable(tiny_model().eval(), RULE.replace(system=system))
    ids, mask = batch()
    expected = prefill(model, ids, LRSACache.of(model), attention_mask=mask)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    cache, ends = LRSACache.of(model), {"contexts": LENGTHS, "first_turns": LENGTHS}
    found, seen = read_prompts(model, cache, ids, mask, **ends, synced=True)
    torch.testing.assert_close(found, expected)
    # The context, the question, and later turns in one call or by tokens.
    assert len(calls) == 2 + (3 if system.answers_by_token else 1)
    assert seen.sum(dim=1).tolist() == list(LENGTHS)
    assert [stream.seen for stream in cache.layers[0].streams] == list(LENGTHS)


def test_processes_are_called_equally_often(monkeypatch):
    """One without later turns reads pads where another has some."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda most, op=None: most.fill_(9))
    model = enable(tiny_model().eval(), RULE)
    ids, mask = batch()
    expected = prefill(model, ids, LRSACache.of(model), attention_mask=mask)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found, seen = read_prompts(model, LRSACache.of(model), ids, mask, first_turns=LENGTHS, synced=True)
    torch.testing.assert_close(found, expected)
    assert (len(calls), seen.shape[1]) == (2, max(LENGTHS) + 9)
