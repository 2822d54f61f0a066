"""A rule, examples of odd lengths, and training steps of a tiny model with an objective."""

import functools

import lightning
import torch
from helpers import quiet_trainer
from torch.utils.data import DataLoader

from lrsa_lit.attention import LAYOUT, LRSAConfig, packed_layout
from lrsa_lit.data.collate import collate_packed, collate_training
from lrsa_lit.models import Backbone
from lrsa_lit.objectives import summed_losses
from lrsa_lit.objectives.positions import Positions
from lrsa_lit.tasks import LongContextQA

RULE = LRSAConfig(sink_size=2, lag_size=16, top_k=4)
SEED, STEP = 7, 3


def example(prompt, answer, name, rejected=0):
    generator = torch.Generator().manual_seed(prompt * 100 + answer)
    ids = torch.randint(3, 259, (prompt + answer + rejected,), generator=generator).tolist()
    return {"id": name, "input_ids": ids[: prompt + answer], "prompt_length": prompt, "gold_spans": [],
            "answer_spans": [], "answers": ["an answer"], "match": "any",
            "rejected": ids[prompt + answer :]}  # fmt: skip


EXAMPLES = [example(70, 3, "a", 35), example(41, 6, "b", 2), example(95, 1, "c", 5), example(60, 4, "d", 4)]


def padded(examples):
    return collate_training(examples, 2)


BATCHES = {"padded": padded, "packed": collate_packed}


def losses(model, objective, batch, seed=SEED, step=STEP):
    """Each term's, summed over the batch."""
    packed = batch["boundaries"] is not None
    extra = {"position_ids": batch["position_ids"], LAYOUT: packed_layout(batch["boundaries"])} if packed else {}
    inputs = {"input_ids": batch["input_ids"], "use_cache": False, **extra}
    return summed_losses(model, objective.terms, Positions(batch, seed, step), inputs)


def fit(batches, objective, *, in_step=None, seed=3, rule=RULE, schedule=None, options={}, **backbone):  # noqa: B006 - read only
    """The changes that an epoch makes to the weights, and what it logged."""
    size = in_step or len(batches)
    for start in range(0, len(batches), size):
        step = batches[start : start + size]
        for batch in step:
            batch["step_sizes"] = [each for other in step for each in other["sizes"]]
    lightning.seed_everything(seed, verbose=False)
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    task = LongContextQA(Backbone("tiny", **backbone), rule, optimizer, train_top_k=schedule, objective=objective)
    task.configure_model()
    before = [weight.detach().clone() for weight in task.parameters()]
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=size, **options)
    trainer.fit(task, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    after = [weight.detach() for weight in task.parameters()]
    changes = [one - other for one, other in zip(after, before, strict=True)]
    return changes, {name: float(value) for name, value in trainer.logged_metrics.items()}


def assert_alike(found, expected, tolerance=2e-4):
    assert any(part.abs().sum() > 0 for part in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-9
