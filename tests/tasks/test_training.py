"""Training steps in a real trainer, on a tiny model: how batches weigh, what is recomputed, what is compiled."""

import functools

import lightning
import pytest
import torch
from helpers import quiet_trainer, refused
from torch.utils.data import DataLoader

from lrsa_lit.attention import LRSAConfig, enabled_config
from lrsa_lit.data.collate import collate, collate_packed
from lrsa_lit.models import Backbone
from lrsa_lit.systems import KeyNorm
from lrsa_lit.tasks import LongContextQA, SampledTopK

RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=4)


def task(*, rate=0.5, train_attention={}, **options):  # noqa: B006 - read only
    optimizer = functools.partial(torch.optim.SGD, lr=rate)
    return LongContextQA(Backbone("tiny", **options), RULE, optimizer, train_attention=train_attention)


def example(prompt, answer):
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(3, 259, (prompt + answer,), generator=generator).tolist()
    empty = {"gold_spans": [], "answer_spans": [], "answers": ["x"], "match": "any"}
    return {"id": f"{prompt}", "input_ids": ids, "prompt_length": prompt, **empty}


def fit(made, batches, **options):
    """The weights after one epoch; the batches of a step know of one another, as a data module's do."""
    size = options.get("accumulate_grad_batches", 1)
    for start in range(0, len(batches), size):
        step = batches[start : start + size]
        for batch in step:
            batch["step_sizes"] = [each for other in step for each in other["sizes"]]
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(made, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    return [parameter.detach().clone() for parameter in made.parameters()]


EXAMPLES = [example(90, 2), example(60, 20), example(120, 5), example(75, 9)]


@pytest.mark.parametrize("train_attention", [{}, None], ids=["lrsa", "dense"])
def test_every_answer_token_weighs_the_same(train_attention):
    """However the examples lie: in one batch, accumulated in unequal ones, or packed."""
    together = fit(task(train_attention=train_attention), [collate(EXAMPLES, 2)])
    accumulated = fit(
        task(train_attention=train_attention),
        [collate(EXAMPLES[:1], 2), collate(EXAMPLES[1:3], 2), collate(EXAMPLES[3:], 2)],
        accumulate_grad_batches=3,
    )
    in_rows = fit(
        task(train_attention=train_attention),
        [collate_packed(EXAMPLES[:3]), collate_packed(EXAMPLES[3:])],
        accumulate_grad_batches=2,
    )
    before = [parameter.detach() for parameter in Backbone("tiny").build().parameters()]
    for start, one, *others in zip(before, together, accumulated, in_rows, strict=True):
        for other in others:
            assert (one - other).norm() <= 1e-4 * (one - start).norm()


def test_a_system_that_cannot_train_is_refused_by_the_task_itself():
    """Its pass of whole sequences is dense."""
    with refused("train_attention", "KeyNorm", reason="cannot be trained with"):
        fit(task(train_attention={"system": KeyNorm()}), [collate(EXAMPLES, 2)])


def test_a_second_step_starts_counting_anew():
    twice = fit(task(), [collate(EXAMPLES[:1], 2), collate(EXAMPLES[1:2], 2)])
    made = task()
    made.configure_model()
    for one in EXAMPLES[:2]:
        (loss,) = made.summed_losses(collate([one], 2), 0)
        count = len(one["input_ids"]) - one["prompt_length"]
        gradients = torch.autograd.grad(loss / count, list(made.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(made.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    for one, other in zip(twice, made.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


def test_dense_training_of_packed_rows_keeps_neighbours_apart():
    made = task(train_attention=None)
    fit(made, [collate_packed(EXAMPLES)])
    assert enabled_config(made.model).dense_layers == (0, 1)


def layer_runs(made):
    """How often a forward of the first layer runs in one training step."""
    made.configure_model()
    runs = []
    made.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    fit(made, [collate(EXAMPLES[:1], 2)])
    return len(runs)


def test_checkpointed_layers_run_again_in_the_backward_pass():
    assert layer_runs(task()) == 1
    assert layer_runs(task(gradient_checkpointing=True)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_compiled_layers_train_to_the_same_weights(checkpointing):
    from torch._dynamo.utils import counters

    # Of one row and of two, packed and not: each form more takes a compiler of C++ 20 s.
    batches = [collate(EXAMPLES[2:], 2), collate_packed(EXAMPLES[:2])]
    eager = fit(task(rate=0.01), batches)
    torch._dynamo.reset()
    counters.clear()
    compiled = fit(task(rate=0.01, compile_layers=True, gradient_checkpointing=checkpointing), batches)
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_each_step_trains_with_the_k_of_its_schedule():
    schedule = SampledTopK([2, 4, 16])
    made = LongContextQA(
        Backbone("tiny"), RULE, functools.partial(torch.optim.SGD, lr=0.5), train_top_k=schedule
    )  # fmt: skip
    made.configure_model()
    seen = []
    made.model.register_forward_pre_hook(lambda *_: seen.append(enabled_config(made.model)))
    lightning.seed_everything(5, verbose=False)
    # Two batches a step: both have its K.
    fit(made, [collate([example(60 + n, 3)], 2) for n in range(12)], accumulate_grad_batches=2)
    drawn = [schedule(5, step, RULE) for step in range(6) for _ in range(2)]
    assert [rule.top_k for rule in seen] == drawn
    assert len(set(drawn)) == 3
    assert {rule.replace(top_k=4) for rule in seen} == {RULE}
