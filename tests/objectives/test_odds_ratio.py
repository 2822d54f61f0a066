"""The odds ratio of two answers: recorded numbers, a plain computation on whole logits, and the ends of its range."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from objective_helpers import BATCHES, EXAMPLES, RULE, losses, padded
from torch.nn.functional import cross_entropy

from lrsa_lit.attention import using
from lrsa_lit.data.collate import collate, collate_training
from lrsa_lit.models import head
from lrsa_lit.models.flops import Shape, training_flops
from lrsa_lit.objectives import AnswerLoss, OddsRatio, Sum
from lrsa_lit.objectives.odds_ratio import log1mexp, odds_ratio_losses
from lrsa_lit.objectives.work import flops

RECORDED = json.loads((Path(__file__).parents[1] / "vectors/systems/color.json").read_text())
NAMES = ("mean_logprob_chosen", "mean_logprob_rejected", "tokens_chosen", "tokens_rejected")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_losses(dtype):
    values = [torch.tensor(RECORDED[name], dtype=dtype) for name in NAMES]
    found = odds_ratio_losses(*values, RECORDED["coefficient"])
    torch.testing.assert_close(-found, torch.tensor(RECORDED["log_sigmoid"], dtype=dtype), rtol=1e-6, atol=1e-6)
    total = RECORDED["nll_chosen"] + RECORDED["beta"] * found.mean()
    assert total.item() == pytest.approx(RECORDED["loss"], abs=1e-6)
    plain = RECORDED["nll_chosen"] + RECORDED["beta"] * odds_ratio_losses(*values, 0.0).mean()
    assert plain.item() == pytest.approx(RECORDED["loss_plain_orpo"], abs=1e-6)


def test_the_defaults_are_the_published_ones():
    assert (OddsRatio().length_factor, OddsRatio().weight) == (RECORDED["coefficient"], RECORDED["beta"])


def plain(logprobs, tokens, factor):
    """The definition, on Python's numbers."""
    chosen, rejected = (min(value, -1e-6) for value in logprobs)
    odds = [math.log(math.exp(value) / -math.expm1(value)) for value in (chosen, rejected)]
    x = max(1.0, factor * (tokens[1] - tokens[0])) * (odds[0] - odds[1])
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


@given(
    st.tuples(*[st.floats(-30.0, 0.0)] * 2),
    st.tuples(*[st.integers(1, 900)] * 2),
    st.sampled_from([0.0, 0.1, 1.5]),
)
def test_a_loss_is_that_of_the_definition(logprobs, tokens, factor):
    values = [torch.tensor([value], dtype=torch.float64) for value in (*logprobs, *map(float, tokens))]
    found = odds_ratio_losses(*values, factor)
    assert found.item() == pytest.approx(plain(logprobs, tokens, factor), rel=1e-9, abs=1e-12)


def test_gradients_of_the_losses():
    generator = torch.Generator().manual_seed(0)
    values = [-torch.rand(5, generator=generator, dtype=torch.float64).mul(4).add(0.01).requires_grad_() for _ in "ab"]
    tokens = [torch.randint(1, 90, (5,), generator=generator) for _ in "ab"]
    assert torch.autograd.gradcheck(lambda *logprobs: odds_ratio_losses(*logprobs, *tokens), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_at_both_ends(dtype):
    x = torch.tensor([-1e-6, -0.1, -math.log(2), -1.0, -30.0, -200.0], dtype=dtype, requires_grad=True)
    found = log1mexp(x)
    expected = [math.log(-math.expm1(value)) if value > -30 else -math.exp(value) for value in x.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-37)
    found.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("logprobs", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-200.0, -1e-9)])
def test_a_text_that_is_certain_has_finite_odds(logprobs):
    chosen, rejected = (torch.tensor([value], requires_grad=True) for value in logprobs)
    found = odds_ratio_losses(chosen, rejected, torch.tensor([3]), torch.tensor([4]))
    found.sum().backward()
    assert found.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_a_large_saving_does_not_underflow():
    """A factor of 50, with the worse text far more likely: log(sigmoid(x)) would be minus infinity."""
    found = odds_ratio_losses(torch.tensor([-9.0]), torch.tensor([-0.01]), torch.tensor([1]), torch.tensor([501]))
    assert 600 < found.item() < 750


def test_a_chosen_text_that_is_longer_has_the_factor_one():
    pair = torch.tensor([-1.0]), torch.tensor([-2.0])
    found, short = (odds_ratio_losses(*pair, torch.tensor([n]), torch.tensor([9])) for n in (400, 1))
    assert torch.equal(found, short)


def summed(model, objective):
    """The loss of all examples on logits that are made whole, one answer at a time."""
    values = []
    for example in EXAMPLES:
        prompt = example["input_ids"][: example["prompt_length"]]
        for answer in (example["input_ids"][len(prompt) :], example["rejected"]):
            with using(model, RULE):
                logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
            values.append(-cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer)))
    tokens = [len(each) for one in EXAMPLES for each in (one["input_ids"][one["prompt_length"] :], one["rejected"])]
    pairs = torch.stack(values).view(-1, 2).T, torch.tensor(tokens).view(-1, 2).T
    return odds_ratio_losses(*pairs[0], *pairs[1], objective.length_factor).sum()


@pytest.mark.parametrize("rows", [5, 1024])
@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_values_and_gradients_are_those_of_a_plain_computation(model, batch, factor, rows, monkeypatch):
    monkeypatch.setattr(head, "ROWS", rows)
    objective = OddsRatio(length_factor=factor)
    (found,), expected = losses(model, objective, batch), summed(model, objective)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    got, wanted = (torch.autograd.grad(each * 0.3, list(model.parameters())) for each in (found, expected))
    for one, other in zip(got, wanted, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-8 * (1 + other.norm())


@pytest.mark.parametrize("collated", BATCHES.values(), ids=BATCHES)
def test_other_terms_and_examples_without_a_pair_are_left_alone(model, collated):
    bare = [{**one, "rejected": []} for one in EXAMPLES]
    mixed = [bare[0], EXAMPLES[1], bare[2], EXAMPLES[3]]
    both = Sum([AnswerLoss(), OddsRatio()])
    answers, odds = losses(model, both, collated(mixed))
    torch.testing.assert_close(answers[None], losses(model, AnswerLoss(), collated(bare)), rtol=1e-9, atol=1e-12)
    alone = sum(losses(model, OddsRatio(), collated([one])) for one in (EXAMPLES[1], EXAMPLES[3]))
    torch.testing.assert_close(odds[None], alone, rtol=1e-9, atol=1e-12)
    assert [OddsRatio().count(size) for size in collated(mixed)["sizes"]] == [0, 1, 0, 1]


def test_arithmetic_is_that_of_both_sequences():
    shape = Shape(2, 4, 8, linear=100, trained=100, head=50, head_trained=50)
    sizes = padded(EXAMPLES)["sizes"]
    lengths = [one["prompt_length"] + n for one in EXAMPLES
               for n in (len(one["input_ids"]) - one["prompt_length"], len(one["rejected"]))]  # fmt: skip
    tokens = sum(lengths) - 2 * sum(one["prompt_length"] for one in EXAMPLES)
    assert flops(OddsRatio(), shape, sizes, None) == training_flops(shape, lengths, tokens, None)


def test_no_pair_is_refused(model):
    with refused("objective"):
        losses(model, OddsRatio(), padded([{**one, "rejected": []} for one in EXAMPLES]))


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
def test_a_factor_out_of_bounds_is_refused(factor):
    with refused("length_factor"):
        OddsRatio(length_factor=factor)


def test_evaluations_see_the_answer_alone():
    batch = collate(EXAMPLES, 2)
    bare = collate([{**one, "rejected": []} for one in EXAMPLES], 2)
    assert "rejected" not in batch
    assert torch.equal(batch["input_ids"], bare["input_ids"])
    assert torch.equal(batch["labels"], bare["labels"])


def test_rows_of_rejected_answers_follow_those_of_the_examples():
    batch = collate_training(EXAMPLES, 2)
    assert batch["input_ids"].shape == (8, 105)
    flat = batch["input_ids"].flatten()
    for one, (start, end) in zip(EXAMPLES, batch["rejected"], strict=True):
        assert flat[start:end].tolist() == one["rejected"]
        prompt = flat[start - one["prompt_length"] : start]
        assert prompt.tolist() == one["input_ids"][: one["prompt_length"]]
    assert (batch["labels"][4:] == -100).all()
