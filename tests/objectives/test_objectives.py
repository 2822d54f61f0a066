"""Objectives against plain float64 computations on logits that are made whole, one example at a time."""

import copy

import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from objective_helpers import BATCHES, EXAMPLES, RULE, SEED, STEP, losses
from torch.nn.functional import cross_entropy, log_softmax, softmax

from lrsa_lit.attention import enable, using
from lrsa_lit.data.collate import ExampleSize, collate_packed, collate_training
from lrsa_lit.models import Backbone, head
from lrsa_lit.models.backbone import LoRA
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.objectives import AnswerLoss, Distillation, HiddenAlignment, LanguageModelLoss, Sum
from lrsa_lit.objectives.distillation import divergence
from lrsa_lit.objectives.distribution import Distribution
from lrsa_lit.objectives.positions import Positions


def drawn(objective, example, besides_answers):
    """Positions of an example, as they are drawn for it alone."""
    alone = Positions(collate_training([example], 2), SEED, STEP)
    count = objective._drawn if besides_answers else objective.count
    return alone.drawn(count, objective.name, besides_answers=besides_answers)


def answers(example):
    return torch.arange(example["prompt_length"] - 1, len(example["input_ids"]) - 1)


def logits(model, example, rule=RULE):
    with using(model, rule):
        return model(input_ids=torch.tensor([example["input_ids"]]), use_cache=False).logits[0]


def layers(model, example, rule):
    with using(model, rule):
        ids = torch.tensor([example["input_ids"]])
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states


def plain_answers(model, _, example):
    where = answers(example)
    return cross_entropy(logits(model, example)[where], torch.tensor(example["input_ids"])[where + 1], reduction="sum")


def plain_next_tokens(model, objective, example):
    where = drawn(objective, example, besides_answers=False)
    return cross_entropy(logits(model, example)[where], torch.tensor(example["input_ids"])[where + 1], reduction="sum")


def plain_divergence(model, objective, example):
    where = torch.cat([drawn(objective, example, besides_answers=True), answers(example)])
    with torch.no_grad():
        teacher = softmax(logits(model, example, None)[where] / objective.temperature, dim=1)
    own = softmax(logits(model, example)[where] / objective.temperature, dim=1)
    if objective.top_n is not None:
        tokens = teacher.topk(objective.top_n, dim=1).indices
        teacher, own = (torch.cat([each.gather(1, tokens), 1 - each.gather(1, tokens).sum(1, keepdim=True)], dim=1)
                        for each in (teacher, own))  # fmt: skip
    if objective.direction == "reverse":
        teacher, own = own, teacher
    return objective.temperature**2 * (teacher * (teacher / own).log()).sum()


def plain_alignment(model, objective, example):
    where = drawn(objective, example, besides_answers=False)
    with torch.no_grad():
        wanted = layers(model, example, None)
    found = layers(model, example, RULE)
    # The last of them has gone through the final norm.
    total = 0
    for number in objective.of_layers:
        one, other = found[number + 1][0, where], wanted[number + 1][0, where]
        total = total + ((one - other).square().sum(1) / other.square().sum(1)).sum()
    return total / len(objective.of_layers)


CASES = [
    (AnswerLoss(), plain_answers),
    (LanguageModelLoss(), plain_next_tokens),
    (LanguageModelLoss(share=0.3), plain_next_tokens),
    (Distillation(positions=17), plain_divergence),
    (Distillation(positions=0), plain_divergence),
    (Distillation(positions=90, temperature=2.5), plain_divergence),
    (Distillation(positions=17, direction="reverse"), plain_divergence),
    (Distillation(positions=17, top_n=5), plain_divergence),
    (HiddenAlignment(of_layers=[0]), plain_alignment),
    (HiddenAlignment(of_layers=[0], positions=9), plain_alignment),
]


@pytest.mark.parametrize("rows", [5, 1024])
@pytest.mark.parametrize(("objective", "plain"), CASES)
def test_values_and_gradients_are_those_of_a_plain_computation(model, batch, objective, plain, rows, monkeypatch):
    monkeypatch.setattr(head, "ROWS", rows)
    (found,) = losses(model, objective, batch)
    expected = sum(plain(model, objective, example) for example in EXAMPLES)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    got = torch.autograd.grad(found * 0.3, list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected * 0.3, list(model.parameters()), allow_unused=True)
    assert any(each is not None and each.abs().sum() > 0 for each in got)
    for one, other in zip(got, wanted, strict=True):
        one, other = (torch.zeros(1) if each is None else each for each in (one, other))
        assert (one - other).norm() <= 1e-8 * (1 + other.norm())


def test_a_sum_is_its_parts_in_one_forward_pass(model, batch):
    parts = [AnswerLoss(), Distillation(positions=20), HiddenAlignment(), LanguageModelLoss(share=0.5)]
    passes = []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    together = losses(model, Sum(parts), batch)
    handle.remove()
    assert passes == [False, True], "one of the teacher of two parts, one of the model"
    torch.testing.assert_close(together, torch.cat([losses(model, part, batch) for part in parts]))


def test_a_term_counts_as_many_positions_as_it_sums(model, batch):
    """With logits that are all alike, each position has the same loss."""
    for parameter in model.parameters():
        parameter.data.zero_()
    for objective in (AnswerLoss(), LanguageModelLoss(), LanguageModelLoss(share=0.3)):
        (found,) = losses(model, objective, batch)
        count = sum(map(objective.count, batch["sizes"]))
        torch.testing.assert_close(found / count, torch.tensor(259.0).double().log())


def test_keeping_everything_leaves_nothing_to_learn_from_oneself(model, batch):
    enable(model, RULE.replace(top_k=RULE.lag_size))
    for objective in (Distillation(positions=30), Distillation(positions=30, top_n=4), HiddenAlignment()):
        (found,) = losses(model, objective, batch)
        assert abs(found.item()) < 1e-9


def test_the_teacher_takes_no_gradient(model, batch):
    """The gradient is that of a frozen copy's distribution, not of both moving."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    objective = Distillation(positions=20)
    (found,) = losses(model, objective, batch)
    got = torch.autograd.grad(found, list(model.parameters()))

    def plain(example):
        where = torch.cat([drawn(objective, example, besides_answers=True), answers(example)])
        teacher = log_softmax(logits(frozen, example, None)[where], dim=1)
        return (teacher.exp() * (teacher - log_softmax(logits(model, example)[where], dim=1))).sum()

    wanted = torch.autograd.grad(sum(map(plain, EXAMPLES)), list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_oneself_teaches_as_a_copy_in_a_folder_does(batch, tmp_path):
    model = enable(tiny_model(), RULE)
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    own = losses(model, Distillation(positions=20), batch)
    other = losses(model, Distillation(str(tmp_path), positions=20, teacher_dtype="float32"), batch)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapters", [True, False])
def test_a_teacher_with_or_without_adapters(batch, adapters):
    model = Backbone("tiny", lora=LoRA(rank=2)).build().double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    enable(model, RULE)
    objective = Distillation(positions=20, adapters=adapters)
    (found,) = losses(model, objective, batch)
    expected = 0
    for example in EXAMPLES:
        where = torch.cat([drawn(objective, example, besides_answers=True), answers(example)])
        with torch.no_grad():
            if adapters:
                teacher = logits(model, example, None)
            else:
                with model.disable_adapter():
                    teacher = logits(model, example, None)
        expected += divergence(logits(model, example)[where], Distribution.of(teacher[where]))
    torch.testing.assert_close(found, expected)


def test_dropout_of_adapters_is_off_in_the_teacher(batch):
    model = enable(Backbone("tiny", lora=LoRA(rank=2, dropout=0.9)).build(), RULE.replace(top_k=RULE.lag_size))
    model.train()
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_pre_hook(lambda module, _: seen.append((torch.is_grad_enabled(), module.training)))
    losses(model, Distillation(positions=20), batch)
    assert set(seen) == {(False, False), (True, True)}


@given(st.data())
def test_what_is_drawn_of_an_example_depends_on_nothing_else(data):
    chosen = data.draw(st.lists(st.sampled_from(EXAMPLES), min_size=1, max_size=4, unique_by=lambda each: each["id"]))
    objective = data.draw(st.sampled_from([Distillation(positions=23), LanguageModelLoss(share=0.4)]))
    beside = isinstance(objective, Distillation)
    for collated in BATCHES.values():
        batch = collated(chosen)
        count = objective._drawn if beside else objective.count
        found = Positions(batch, SEED, STEP).drawn(count, objective.name, besides_answers=beside)
        width = batch["input_ids"].shape[1]
        starts = batch["boundaries"] or range(0, width * len(chosen), width)
        alone = [start + drawn(objective, one, beside) for start, one in zip(starts, chosen, strict=False)]
        assert torch.equal(found, torch.cat(alone))
        tokens = batch["input_ids"].flatten()
        for start, one in zip(starts, chosen, strict=False):
            own = found[(found >= start) & (found < start + len(one["input_ids"]))] - start
            assert own.tolist() == sorted(set(own.tolist())), "in order, none twice"
            assert tokens[start + own].tolist() == [one["input_ids"][place] for place in own]
            assert own.max() < (one["prompt_length"] - 1 if beside else len(one["input_ids"]) - 1)


def test_positions_are_drawn_anew_in_each_step_and_run():
    batch = collate_packed(EXAMPLES)
    found = {
        tuple(Positions(batch, seed, step).drawn(lambda _: 10, name).tolist())
        for seed in (0, 1) for step in (0, 1) for name in ("kl", "hidden")
    }  # fmt: skip
    assert len(found) == 8


@pytest.mark.parametrize("top_n", [None, 1, 3, 6])
def test_divergence_of_a_distribution_from_itself_is_zero_and_else_positive(top_n):
    torch.manual_seed(0)
    one, other = torch.randn(2, 4, 7, dtype=torch.float64)
    for direction in ("forward", "reverse"):
        assert abs(divergence(one, Distribution.of(one, top_n), direction)) < 1e-12
        found = divergence(one, Distribution.of(other, top_n), direction)
        assert found > 0
        # Bins can only hide differences.
        assert found <= divergence(one, Distribution.of(other), direction) + 1e-12


def test_a_teacher_whose_head_has_further_rows(batch, tmp_path):
    model, teacher = enable(tiny_model(), RULE), tiny_model()
    teacher.resize_token_embeddings(300)
    teacher.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    own = losses(model, Distillation(positions=20), batch)
    other = losses(model, Distillation(str(tmp_path), positions=20, teacher_dtype="float32"), batch)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: AnswerLoss(weight=-1.0), "weight"),
        (lambda: AnswerLoss(weight=float("nan")), "weight"),
        (lambda: LanguageModelLoss(share=0.0), "share"),
        (lambda: LanguageModelLoss(share=1.1), "share"),
        (lambda: Distillation(positions=-1), "positions"),
        (lambda: Distillation(temperature=0.0), "temperature"),
        (lambda: Distillation(top_n=0), "top_n"),
        (lambda: Distillation(positions=4096).check(4096, 2), "positions"),
        (lambda: HiddenAlignment(positions=0), "positions"),
        (lambda: HiddenAlignment(of_layers=[]), "of_layers"),
        (lambda: HiddenAlignment(of_layers=[1, 1]), "of_layers"),
        (lambda: HiddenAlignment(of_layers=[-1]), "of_layers"),
        (lambda: HiddenAlignment(of_layers=[2]).check(64, 2), "of_layers"),
        (lambda: HiddenAlignment(positions=64).check(64, 2), "positions"),
        (lambda: Sum([]), "objectives"),
        (lambda: Sum([AnswerLoss(), AnswerLoss()]), "objectives"),
        (lambda: Sum([AnswerLoss(weight=0.0)]), "objectives"),
    ],
)
def test_values_that_are_not_allowed(make, field):
    with refused(field):
        make()


def test_an_answer_without_a_prompt_has_a_token_less_to_learn():
    assert ExampleSize.of(5, 0)[:2] == (5, 4)
    assert ExampleSize.of(5, 3)[:2] == (5, 2)
