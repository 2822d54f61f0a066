"""Training steps with objectives: how positions weigh, what is logged, what goes on exactly."""

import functools

import lightning
import pytest
import torch
from helpers import quiet_trainer, refused
from hypothesis import given
from hypothesis import strategies as st
from objectives.conftest import EXAMPLES, RULE
from torch.utils.data import DataLoader

from lrsa_lit.data.collate import collate_packed, collate_training
from lrsa_lit.data.order import Shuffled
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.data.policies import FixedSize
from lrsa_lit.data.sampler import EpochSampler
from lrsa_lit.models import Backbone
from lrsa_lit.models.backbone import LoRA
from lrsa_lit.objectives import AnswerLoss, Distillation, HiddenAlignment, LanguageModelLoss, Sum
from lrsa_lit.tasks import LongContextQA

ALL = Sum([AnswerLoss(), Distillation(positions=30, weight=0.7), HiddenAlignment(positions=9, weight=2.0),
           LanguageModelLoss(share=0.5, weight=0.3)])  # fmt: skip


def padded(examples):
    return collate_training(examples, 2)


def fit(batches, objective=ALL, *, in_step=None, seed=3, **backbone):
    """The changes that an epoch makes to the weights, and what it logged."""
    size = in_step or len(batches)
    for start in range(0, len(batches), size):
        step = batches[start : start + size]
        for batch in step:
            batch["step_sizes"] = [each for other in step for each in other["sizes"]]
    lightning.seed_everything(seed, verbose=False)
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    task = LongContextQA(Backbone("tiny", **backbone), RULE, optimizer, objective=objective)
    task.configure_model()
    before = [weight.detach().clone() for weight in task.parameters()]
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=size)
    trainer.fit(task, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    after = [weight.detach() for weight in task.parameters()]
    changes = [one - other for one, other in zip(after, before, strict=True)]
    return changes, {name: float(value) for name, value in trainer.logged_metrics.items()}


def assert_alike(found, expected, tolerance=2e-4):
    assert any(part.abs().sum() > 0 for part in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-9


CUTS = {
    "4x1": [[0], [1], [2], [3]],
    "2x2": [[0, 1], [2, 3]],
    "unequal": [[2], [0, 1, 3]],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("made", [padded, collate_packed])
def test_each_position_weighs_the_same_however_a_step_is_cut(cut, made):
    together, _ = fit([padded(EXAMPLES)])
    in_parts, _ = fit([made([EXAMPLES[place] for place in part]) for part in cut])
    assert_alike(in_parts, together)


@pytest.mark.parametrize(
    "options", [{"lora": LoRA(rank=2)}, {"gradient_checkpointing": True}], ids=["lora", "recomputed"]
)
def test_adapters_and_recomputed_layers_do_the_same(options):
    together, _ = fit([padded(EXAMPLES)], **options)
    in_parts, _ = fit([padded(EXAMPLES[:1]), collate_packed(EXAMPLES[1:])], **options)
    assert_alike(in_parts, together)
    if "lora" not in options:
        assert_alike(fit([padded(EXAMPLES)])[0], together)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_do_the_same(checkpointing):
    batches = [padded(EXAMPLES[:2]), collate_packed(EXAMPLES[2:])]
    eager, _ = fit(batches, in_step=1)
    torch._dynamo.reset()
    compiled, _ = fit(batches, in_step=1, compile_layers=True, gradient_checkpointing=checkpointing)
    assert_alike(compiled, eager, tolerance=2e-3)


def test_each_term_is_logged_and_their_weighted_sum():
    _, logged = fit([padded(EXAMPLES)])
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
