"""Training steps with objectives: what is logged, what trains nothing, which examples a step has."""

import pytest
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from objective_helpers import EXAMPLES, RULE, assert_alike, fit, padded

from lrsa_lit.data.order import Shuffled
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.data.policies import FixedSize
from lrsa_lit.data.sampler import EpochSampler
from lrsa_lit.models import Backbone
from lrsa_lit.objectives import AnswerLoss, Distillation, HiddenAlignment, LanguageModelLoss, Sum
from lrsa_lit.tasks import LongContextQA

ALL = Sum([AnswerLoss(), Distillation(positions=30, weight=0.7), HiddenAlignment(positions=9, weight=2.0),
           LanguageModelLoss(share=0.5, weight=0.3)])  # fmt: skip


def test_each_term_is_logged_and_their_weighted_sum():
    _, logged = fit([padded(EXAMPLES)], ALL)
    terms = {name.rpartition("/")[2]: value for name, value in logged.items() if name.startswith("train/loss/")}
    assert terms.keys() == {"answers", "kl", "hidden", "next_tokens"}
    expected = terms["answers"] + 0.7 * terms["kl"] + 2.0 * terms["hidden"] + 0.3 * terms["next_tokens"]
    assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)
    _, logged = fit([padded(EXAMPLES)], None)
    assert logged["train/loss"] == pytest.approx(terms["answers"], rel=1e-5)
    assert not [name for name in logged if name.startswith("train/loss/")]


def test_a_term_of_weight_zero_is_logged_and_trains_nothing():
    with_it, logged = fit([padded(EXAMPLES)], Sum([AnswerLoss(), HiddenAlignment(weight=0.0)]))
    without, _ = fit([padded(EXAMPLES)], AnswerLoss())
    assert logged["train/loss/hidden"] > 0
    assert_alike(with_it, without)


def test_a_model_that_trains_dense_does_not_teach_itself():
    for objective in (Distillation(), Sum([AnswerLoss(), HiddenAlignment()])):
        with refused("objective"):
            LongContextQA(Backbone("tiny"), RULE, train_attention=None, objective=objective)


@given(st.integers(1, 17), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_batch_knows_the_examples_of_its_step(examples, size, ranks, batches_a_step, data):
    if examples < ranks:
        return
    plan = EpochPlan([1] * examples, FixedSize(size), Shuffled(examples), ranks, batches_a_step=batches_a_step)
    cut_at = data.draw(st.integers(1, len(plan) // ranks))
    of_ranks = [EpochSampler(plan, 0, rank, cut_at).batches(0)[:cut_at] for rank in range(ranks)]
    for first in range(0, cut_at, batches_a_step):
        step = [batch for batches in of_ranks for batch in batches[first : first + batches_a_step]]
        together = sorted(position for batch in step for position in batch)
        assert all(sorted(batch.of_step) == together for batch in step)
