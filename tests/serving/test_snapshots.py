"""Snapshots: prompts that begin alike are read once, in bounded memory, and answered as ever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_helpers import KINDS, ROOMY, RULE, alone, prompt, run

from lrsa_lit.attention import LRSACache, enable, prefill
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.serving.engine import Engine, Limits
from lrsa_lit.serving.job import Job
from lrsa_lit.serving.snapshots import Snapshots

FIRST = RULE.sink_size + 2 * RULE.lag_size


@pytest.fixture(scope="module")
def plain():
    return tiny_model().double().eval()


def ends(length, chunk=RULE.lag_size):
    return list(range(FIRST, length, chunk))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_read_once_by_the_third_question(kind, plain):
    model = enable(plain, KINDS[kind])
    engine, text = Engine(model, frozenset(), ROOMY), prompt(100)
    chunk = KINDS[kind].rule.chunk
    for number in range(4):
        job = Job(str(number), [*text, *prompt(30, 7 + number)], 12)
        answers, found = run(engine, [job])
        # What the text ends with is known once a second prompt has departed there.
        expected = [0, FIRST, ends(101, chunk)[-1], ends(101, chunk)[-1]][number]
        assert found[job.uid, 0].cached == expected
        assert answers[job.uid, 0] == alone(model, job, frozenset())


def test_the_same_prompt_goes_on_from_its_last_chunk(plain):
    engine = Engine(enable(plain, RULE), frozenset(), ROOMY)
    job = Job("a", prompt(100), 3)
    first, _ = run(engine, [job])
    again, found = run(engine, [job])
    assert again == first
    assert found["a", 0].cached == ends(100)[-1]


def test_a_prompt_is_digested_once_though_its_cache_is_restored(plain, monkeypatch):
    digested, keys = [], Snapshots._keys
    monkeypatch.setattr(Snapshots, "_keys", lambda store, ids: (digested.append(len(ids)), keys(store, ids))[1])
    engine = Engine(enable(plain, RULE), frozenset(), ROOMY)
    for _ in range(2):
        run(engine, [Job("a", prompt(100), 1)])
    assert digested == [100, 100]


def test_choices_and_rows_that_go_on_leave_snapshots_as_they_are(plain):
    engine = Engine(enable(plain, RULE), frozenset(), ROOMY)
    jobs = [Job(str(number), prompt(100), 40, temperature=1.0, seed=3, choices=2) for number in range(3)]
    answers = [run(engine, [job])[0] for job in jobs]
    assert [list(each.values()) for each in answers] == [list(answers[0].values())] * 3


@torch.no_grad()
def test_snapshots_of_a_text_share_its_compact_pairs(plain):
    model = enable(plain, RULE)
    store, ids = Snapshots(RULE.rule, 1 << 30, every=RULE.lag_size), prompt(200)
    cache, before, at = LRSACache.of(model), None, 0
    known, key, planned = store.plan(ids)
    assert (known, key, list(planned)) == (0, None, ends(200))
    for end, key in planned.items():
        prefill(model, torch.tensor([ids[at:end]]), cache)
        store.take(key, cache, before)
        before, at = key, end
    pair = 2 * 16 * 8 * 2 * 2  # keys and values, channels, bytes, heads, layers
    windows = [2 * RULE.lag_size + (0 if number else RULE.sink_size) for number in range(len(planned))]
    compact = RULE.sink_size + RULE.top_k * (len(planned) - 1)
    assert store.nbytes == (sum(windows) + compact) * pair
    restored = LRSACache.of(model)
    store.restore(store.plan(ids).key, restored)
    assert prefill(model, torch.tensor([ids[at:]]), restored).equal(prefill(model, torch.tensor([ids[at:]]), cache))


@settings(max_examples=15, deadline=None)
@given(capacity=st.integers(0, 60_000), order=st.lists(st.integers(0, 3), min_size=3, max_size=9))
def test_memory_is_bounded_and_answers_are_right_whatever_is_evicted(plain, capacity, order):
    engine = Engine(enable(plain, RULE), frozenset(), Limits(snapshots=capacity, tokens_per_step=64))
    texts = {0: prompt(60), 1: prompt(90), 2: [*prompt(60)[:40], *prompt(30, 5)], 3: prompt(45, 9)}
    for number, text in enumerate(order):
        answers, _ = run(engine, [Job(str(number), texts[text], 3)])
        store = engine.snapshots
        kept = store._kept.values()
        assert store.nbytes == sum(each.nbytes for each in kept) <= capacity
        assert all(each.parent is None or each.parent in kept for each in kept), "a snapshot without its parent"
        assert answers[str(number), 0] == expected(engine.model, texts[text])


_EXPECTED = {}


def expected(model, text):
    key = tuple(text)
    if key not in _EXPECTED:
        _EXPECTED[key] = alone(model, Job("x", text, 3), frozenset())
    return _EXPECTED[key]


def test_the_oldest_goes_first(plain):
    model = enable(plain, RULE)
    one = Engine(model, frozenset(), ROOMY)
    run(one, [Job("a", prompt(40), 1)])
    engine = Engine(model, frozenset(), Limits(snapshots=2 * one.snapshots.nbytes, tokens_per_step=64))
    for seed in (0, 1, 0, 2):
        run(engine, [Job(str(seed), prompt(40, seed), 1)])
    cached = {seed: run(engine, [Job(str(seed), prompt(40, seed), 1)])[1][str(seed), 0].cached for seed in (0, 2)}
    assert cached == {0: ends(40)[-1], 2: ends(40)[-1]}
    assert run(engine, [Job("1", prompt(40, 1), 1)])[1]["1", 0].cached == 0


def test_no_capacity_keeps_nothing(plain):
    engine = Engine(enable(plain, RULE), frozenset(), Limits(snapshots=0))
    for _ in range(2):
        _, found = run(engine, [Job("a", prompt(90), 1)])
        assert found["a", 0].cached == 0
    assert len(engine.snapshots) == 0


def test_a_text_that_begins_otherwise_is_another(plain):
    engine = Engine(enable(plain, RULE), frozenset(), ROOMY)
    text = prompt(90)
    for ids in (text, [text[0] ^ 1, *text[1:]]):
        assert run(engine, [Job("a", ids, 1)])[1]["a", 0].cached == 0


def test_prompts_read_at_the_same_time_may_share_a_snapshot(plain):
    engine = Engine(enable(plain, RULE), frozenset(), ROOMY)
    jobs = [Job(str(number), [*prompt(70), *prompt(20, number)], 6) for number in range(5)]
    answers, _ = run(engine, jobs, arriving=5)
    for job in jobs:
        assert answers[job.uid, 0] == alone(engine.model, job, frozenset())
