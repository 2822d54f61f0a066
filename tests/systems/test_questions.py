"""Where the prompt ends that a system cuts: behind the context, or behind the question; the budget is of both."""

import dataclasses
import itertools

import pytest
import torch
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lrsa_lit.attention import Greedy, LRSACache, LRSAConfig, at_budget, head_of, prefill, read_prompts, shares, using
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
    KVzip,
    LagKVPress,
    SnapKV,
    SqueezedAttention,
    StreamingLLM,
)

LAYERS = 3
CONTEXT, PROMPT = 96, 120
SYSTEMS = [
    SnapKV(window=4), TOVA(), ExpectedAttention(), KeyDiff(), LagKVPress(lag_size=8), StreamingLLM(),
    ChunkKV(size=5, window=3), ChunkKVPress(size=5, scorer=SnapKV(window=4)), AdaKV(scorer=SnapKV(window=4)),
    KVzip(chunk=50),
]  # fmt: skip
of_each = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: type(system).__name__)


def encode(text):
    return [3 + ord(letter) % 60 for letter in text]


def read(model, system, prompt, **ends):
    """The cache behind prompts (B, T)."""
    with using(model, LRSAConfig(system=system)):
        cache = LRSACache.of(model)
        logits, _ = read_prompts(model, cache, prompt, encode=encode, **ends)
    return cache, logits


def kept(cache):
    return [stream.kept.tolist() for layer in cache.layers for stream in layer.streams]


@of_each
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(1, 12))
def test_what_stays_of_a_context_does_not_depend_on_the_question(system, seed, length, model):
    draw = torch.Generator().manual_seed(seed)
    context = torch.randint(3, 64, (1, 40), generator=draw)
    pairs = seed % 2 == 0
    system = dataclasses.replace(system, **({"pairs": 30} if pairs else {"kept": 0.4}))
    questions = [torch.randint(3, 64, (1, length), generator=draw) for _ in range(2)]
    found = [kept(read(model, system, torch.cat([context, each], dim=1), contexts=[40])[0]) for each in questions]
    assert found[0] == found[1]
    assert max(place for layer in found[0] for row in layer for head in row for place in head) < 40
    if not pairs:
        assert found[0] == kept(read(model, system, context)[0])


@of_each
def test_one_that_sees_the_question_cuts_behind_it(system, model, ids):
    system = dataclasses.replace(system, kept=0.4, question=True)
    prompt = ids(2, 40)
    found, logits = read(model, system, prompt, contexts=[30, 25])
    expected, last = read(model, system, prompt)
    assert kept(found) == kept(expected)
    assert torch.equal(logits, last)
    assert found.nbytes == expected.nbytes


@of_each
def test_a_budget_is_that_of_the_bytes_at_the_end_of_the_prompt(system, model, ids):
    """As the memory says; of rows that have equal contexts but unequal questions too."""
    config = at_budget(LRSAConfig(system=system), 0.5, PROMPT, LAYERS, head_of(model.config, 8))
    allowed = config.system.pairs
    row = ids(1, PROMPT)
    prompts = torch.cat([row, row.where(torch.arange(PROMPT) >= 11, 0)])
    mask = (torch.arange(PROMPT) >= torch.tensor([[0], [11]])).long()
    cache, _ = read(model, config.system, prompts, attention_mask=mask, contexts=[CONTEXT, CONTEXT])
    pair = 2 * 2 * 8 * 8
    for place in range(2):
        held = sum(buffer.nbytes for layer in cache.layers for part in layer.streams[place].parts
                   for buffer in part.buffers)  # fmt: skip
        measured = cache.measured(2)[place]
        assert measured.held == held
        # Whole chunks, of which the last is shorter, may leave some of it.
        assert 0 <= allowed - held / (LAYERS * pair) < (10 if hasattr(system, "size") else 0.01)
    assert all(len(layer.streams) == 2 for layer in cache.layers)


@pytest.mark.parametrize("system", [KeyDiff(pairs=20), SqueezedAttention(observed=9)])
def test_rows_get_what_each_gets_alone(system, model, ids):
    prompts, lengths, contexts = ids(3, 40), [40, 35, 40], [30, 30, 36]
    mask = (torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]).long()
    with using(model, LRSAConfig(system=system)):
        greedy = Greedy(model, stops=(), max_new_tokens=4)
        together = greedy(prompts, mask, None, contexts)
        for row, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
            assert greedy(prompts[row : row + 1, -length:], None, None, [context]) == [together[row]]


def test_a_question_of_more_tokens_than_pairs_leaves_one(model, ids):
    cache, _ = read(model, KeyDiff(pairs=7), ids(1, 40), contexts=[30])
    assert cache.stored_tokens() == [1 + 10] * LAYERS
    # Sinks always stay.
    cache, _ = read(model, KVzip(pairs=7, sink_size=4), ids(1, 40), contexts=[30])
    assert cache.stored_tokens() == [4 + 10] * LAYERS


def test_pairs_are_those_that_the_question_sees(model, ids):
    with using(model, LRSAConfig(system=KeyDiff(pairs=20))):
        greedy = Greedy(model, stops=(), max_new_tokens=2)
        greedy(ids(1, 40), None, None, [30])
        found = shares([greedy.usage])
    assert found["pairs"] == (30 * 31 / 2 + sum(range(11, 21))) / (40 * 41 / 2)
    assert (found["cache"], found["kept"], found["peak"]) == (0.5, 0.5, 0.75)


def test_pairs_of_squeezed_attention_lack_what_the_question_has_not_read(model, ids):
    cache, _ = read(model, SqueezedAttention(sparsity=0.5, observed=9, clusters=0.5), ids(1, 40), contexts=[30])
    stream = cache.layers[0].streams[0]
    skipped = 40 * 41 / 2 - stream.attended_pairs
    # Of 21 clustered keys each of 10 tokens skips as many, a mean of two heads.
    assert 0 < skipped / 10 < 21
    assert skipped / 10 * 2 == round(skipped / 10 * 2)


def test_peaks_are_those_of_the_whole_prompt(model, ids):
    with using(model, LRSAConfig(system=KeyDiff(1.0))):
        greedy = Greedy(model, stops=(), max_new_tokens=1)
        greedy(ids(1, 40), None, None, [30])
    found = shares([greedy.usage])
    assert (found["cache"], found["peak"], found["pairs"]) == (1.0, 1.0, 1.0)


def test_kvzip_repeats_the_context_alone(model, ids, monkeypatch):
    prompt, seen = ids(1, 40), []
    begin = KVzip.begin_repeat
    monkeypatch.setattr(KVzip, "begin_repeat", lambda *given: seen.append(given[-1]) or begin(*given))
    read(model, KVzip(0.5, sink_size=2, chunk=20), prompt, contexts=[30])
    assert [(part.start, part.stop) for part in seen] == [(2, 22), (22, 30)]
    repeated = list(itertools.chain(*(part.ids[-(part.stop - part.start) :] for part in seen)))
    assert repeated == prompt[0, 2:30].tolist()


def test_squeezed_attention_clusters_the_context_and_reads_the_question_in_one_call(model, ids):
    prompt, calls = ids(1, 40), []
    hook = model.register_forward_hook(lambda _, __, output: calls.append(output.logits.shape))
    for system, clustered in ((SqueezedAttention(observed=9), 21), (SqueezedAttention(observed=9, question=True), 31)):
        cache, _ = read(model, system, prompt, contexts=[30])
        stream = cache.layers[0].streams[0]
        assert stream.levels[0].labels.shape[2] == clustered
        assert (stream.seen, stream.reads) == (40, [])
    hook.remove()
    assert len(calls) == 2 + 1


@pytest.mark.parametrize(
    "system", [None, FreqKV(capacity=20), Cascade(window=4, sink_size=2, stride=5), KeyDiffBlocks(pairs=9, block=4)]
)
def test_what_compresses_while_it_reads_knows_no_context(system, model, ids):
    config = LRSAConfig(2, 8, 3) if system is None else LRSAConfig(system=system)
    prompt, calls = ids(1, 60), []
    with using(model, config):
        with torch.no_grad():
            last = prefill(model, prompt, LRSACache.of(model))
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        logits, _ = read_prompts(model, LRSACache.of(model), prompt, contexts=[30])
        hook.remove()
    assert torch.equal(logits, last)
    assert len(calls) == 1


@pytest.mark.parametrize("cls", [SnapKV, KVzip, AdaKV, SqueezedAttention])
def test_whether_it_sees_the_question_is_yes_or_no(cls):
    with refused("question", 1):
        cls(question=1)
