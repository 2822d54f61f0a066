"""The engine without a server: whoever else is answered, each job gets what it gets alone."""

import pytest
import torch
from helpers import refused
from serving_helpers import KINDS, ROOMY, RULE, STOPS, alone, prompt, run

from lrsa_lit.attention import LRSACache, LRSAConfig, enable
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import KeyValueStream
from lrsa_lit.serving.engine import Engine, Limits
from lrsa_lit.serving.job import Job
from lrsa_lit.serving.memory import PastBytes
from lrsa_lit.systems import SnapKV


@pytest.fixture(scope="module")
def plain():
    # Sums of float64 in another order never change a token.
    return tiny_model().double().eval()


@pytest.fixture
def model(plain):
    return enable(plain, RULE)


@pytest.mark.parametrize("graphed", [False, True], ids=["rows", "places"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_is_what_the_job_gets_alone(kind, graphed, plain):
    model = enable(plain, KINDS[kind])
    lengths = [1, 90, 17, 18, 40, 7, 131, 64, 33]
    jobs = [Job(str(seed), prompt(length, seed), 5 + 7 * seed % 30) for seed, length in enumerate(lengths)]
    answers, ends = run(Engine(model, STOPS, ROOMY, graphed=graphed), jobs)
    for job in jobs:
        expected = alone(model, job)
        assert answers[job.uid, 0] == expected
        assert ends[job.uid, 0].finish == ("length" if len(expected) == job.max_new_tokens else "stop")


def test_the_rows_of_free_places_are_seldom_rewound(model, monkeypatch):
    """In every layer and at each token this would be time of the host."""
    counted, rewind = [], KeyValueStream.rewind
    monkeypatch.setattr(KeyValueStream, "rewind", lambda stream: (counted.append(stream), rewind(stream))[1])
    jobs = [Job(str(seed), prompt(20, seed), 45) for seed in range(3)]
    answers, _ = run(Engine(model, frozenset(), ROOMY, graphed=True), jobs)
    assert all(answers[job.uid, 0] == alone(model, job, frozenset()) for job in jobs)
    # One place of four is free. The row may have 15 tokens, one less than the rule would compress.
    layers = model.config.num_hidden_layers
    assert layers <= len(counted) <= 5 * layers


def test_generate_gives_the_same(model):
    ids = prompt(70)
    answers, _ = run(Engine(model, STOPS, ROOMY), [Job("a", ids, 12), Job("b", prompt(30), 40)])
    given = {"past_key_values": LRSACache.of(model), "eos_token_id": sorted(STOPS), "do_sample": False}
    whole = model.generate(torch.tensor([ids]), max_new_tokens=12, pad_token_id=0, **given)[0, 70:].tolist()
    assert answers["a", 0] == [token for token in whole if token not in STOPS]


def test_draws_depend_on_the_seed_alone(model):
    def answers(others):
        job = Job("a", prompt(50), 16, temperature=1.5, top_p=0.9, seed=5, choices=3)
        return {
            key: value for key, value in run(Engine(model, STOPS, ROOMY), [*others, job])[0].items() if key[0] == "a"
        }

    first = answers([])
    assert answers([Job("b", prompt(90, 1), 30), Job("c", prompt(9), 30, temperature=1.0, seed=5)]) == first
    assert len({tuple(answer) for answer in first.values()}) == 3


def test_a_long_prompt_does_not_keep_others_waiting(model):
    engine = Engine(model, frozenset(), Limits(tokens_per_step=16))
    engine.submit(Job("short", prompt(5), 40))
    engine.step()
    engine.submit(Job("long", prompt(400), 2))
    for _ in range(20):
        assert [event.uid for event in engine.step()] == ["short"]
    engine.submit(Job("second", prompt(10), 2))
    found = [event.uid for _ in range(3) for event in engine.step()]
    assert "second" in found
    assert "long" not in found


def test_jobs_wait_for_memory_in_their_order(model):
    form = PastBytes(RULE, model.config, 8)
    limits = Limits(memory=form.most(100) + form.most(30), tokens_per_step=16)
    engine = Engine(model, frozenset(), limits)
    jobs = [Job("a", prompt(90), 10), Job("b", prompt(90), 10), Job("c", prompt(20), 10)]
    for job in jobs:
        engine.submit(job)
    order, most = [], 0
    while not engine.idle:
        order += [event.uid for event in engine.step() if event.finish]
        held = engine.held
        assert held.reserved <= limits.memory
        most = max(most, held.rows + held.reading)
    assert order == ["a", "b", "c"] or order == ["a", "c", "b"]
    assert most == 2


def test_rows_are_bounded(model):
    engine = Engine(model, frozenset(), Limits(rows=3))
    jobs = [Job(str(number), prompt(9, number), 12, choices=1 + number % 2) for number in range(6)]
    for job in jobs:
        engine.submit(job)
    while not engine.idle:
        engine.step()
        assert engine.held.rows <= 3


def test_what_never_fits_is_refused(model):
    with refused("messages", reason="more than the 1,000 of this server"):
        Engine(model, STOPS, Limits(memory=1000)).submit(Job("a", prompt(90), 10))
    with refused("n", 33):
        Engine(model, STOPS).submit(Job("a", prompt(9), 10, choices=33))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 17, 18, 19, 26, 64, 131, 200])
def test_the_closed_form_bounds_what_is_held(kind, tokens, plain):
    model = enable(plain, KINDS[kind])
    cache, ids, most = LRSACache.of(model), torch.tensor([prompt(tokens)]), 0
    with torch.no_grad():
        for at in range(tokens):
            model(ids[:, at : at + 1], past_key_values=cache)
            most = max(most, cache.nbytes)
    bound = PastBytes(KINDS[kind], model.config, 8).most(tokens)
    assert most <= bound <= most * 1.05 + 1


@pytest.mark.parametrize("when", [0, 1, 3, 12], ids=["waiting", "reading", "read", "decoding"])
def test_a_cancelled_job_leaves_nothing(when, model):
    engine = Engine(model, frozenset(), ROOMY)
    engine.submit(Job("kept", prompt(20), 20))
    engine.submit(Job("gone", prompt(40, 1), 30, choices=2))
    events = [event for _ in range(when) for event in engine.step()]
    engine.cancel("gone")
    later = []
    while not engine.idle:
        later += engine.step()
    assert {event.uid for event in later} == {"kept"}
    assert [event.token for event in [*events, *later] if event.uid == "kept"] == alone(
        model, Job("kept", prompt(20), 20)
    )
    assert engine.held[:4] == (0, 0, 0, 0)


def test_a_job_that_fails_takes_no_other_with_it(model, monkeypatch):
    engine = Engine(model, STOPS, ROOMY)
    jobs = [Job("good", prompt(20), 8), Job("bad", prompt(21), 8)]
    read = engine._read_piece

    def failing(each):
        if each.job.uid == "bad":
            raise RuntimeError("no memory")
        return read(each)

    monkeypatch.setattr(engine, "_read_piece", failing)
    answers, ends = run(engine, jobs)
    assert answers["good", 0] == alone(model, jobs[0])
    assert (ends["bad", 0].finish, ends["bad", 0].error) == ("error", "no memory")


def test_after_a_failed_step_others_are_answered(model, monkeypatch):
    engine = Engine(model, frozenset(), ROOMY)
    engine.submit(Job("a", prompt(20), 8))
    [engine.step() for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(engine._rows, "step", lambda tokens: 1 / 0)
        assert [(event.uid, event.finish) for event in engine.step()] == [("a", "error")]
    assert engine.idle
    job = Job("b", prompt(20), 8)
    assert run(engine, [job])[0]["b", 0] == alone(model, job, frozenset())


def test_systems_are_refused_by_name(plain):
    with refused("system", "SnapKV"):
        Engine(enable(plain, LRSAConfig(system=SnapKV())), STOPS)
