"""K that changes from step to step."""

from collections import Counter

import pytest
from helpers import refused

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.models import Backbone
from lrsa_lit.tasks import AnnealedTopK, LongContextQA, SampledTopK

RULE = LRSAConfig(sink_size=2, lag_size=64, top_k=16)


def test_annealing_falls_from_l_to_the_rule_and_stays():
    schedule = AnnealedTopK(steps=4)
    assert [schedule(0, step, RULE) for step in range(7)] == [64, 52, 40, 28, 16, 16, 16]
    assert [AnnealedTopK(steps=2, start=20)(0, step, RULE) for step in range(4)] == [20, 18, 16, 16]
    rising = AnnealedTopK(steps=2, start=0)
    assert [rising(0, step, RULE) for step in range(3)] == [0, 8, 16]


def test_samples_are_decided_by_seed_and_step():
    schedule = SampledTopK([4, 16, 64])
    drawn = [schedule(3, step, RULE) for step in range(3000)]
    assert drawn == [schedule(3, step, RULE) for step in range(3000)]
    assert drawn != [schedule(4, step, RULE) for step in range(3000)]
    counts = Counter(drawn)
    assert set(counts) == {4, 16, 64}
    assert min(counts.values()) > 900


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: SampledTopK([]), "choices", ()),
        (lambda: AnnealedTopK(steps=0), "steps", 0),
        (lambda: task(SampledTopK([4, 65])), "choices", 65),
        (lambda: task(AnnealedTopK(steps=3, start=65)), "start", 65),
        (lambda: task(SampledTopK([4]), train_attention=None), "train_top_k", None),
    ],
)
def test_what_cannot_be_is_refused(make, field, value):
    with refused(field, value):
        make()


def task(schedule, **options) -> LongContextQA:
    return LongContextQA(Backbone("tiny"), RULE, train_top_k=schedule, **options)
