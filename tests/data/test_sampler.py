import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from data_helpers import Words, built
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.order import Shuffled
from lrsa_lit.data.plan import EpochPlan
from lrsa_lit.data.policies import FixedSize
from lrsa_lit.data.sampler import EpochSampler


def plan(examples: int, batch_size: int, ranks: int = 1) -> EpochPlan:
    return EpochPlan([1] * examples, FixedSize(batch_size), Shuffled(examples), ranks)


def flat(batches: Sequence[Sequence[int]]) -> list[int]:
    return [position for batch in batches for position in batch]


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """A state after a checkpoint file that is loaded without executing anything."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(st.integers(1, 20), st.integers(1, 4), st.data())
def test_a_sampler_goes_on_where_a_state_was_taken(examples: int, size: int, data: st.DataObject):
    made = plan(examples, size)
    taken = data.draw(st.integers(0, 3 * len(made)))
    whole = EpochSampler(made, seed=5)
    batches, states = [], [whole.state_dict()]
    for _ in range(4):
        iterator = iter(whole)
        for batch in iterator:
            batches.append(batch)
            states.append(iterator.state_dict())
    resumed = EpochSampler(made, seed=6)
    resumed.load_state_dict(stored(states[taken]))
    rest = list(resumed)
    while len(rest) < len(batches) - taken:
        rest += list(resumed)
    assert rest == batches[taken:]


def test_an_epoch_begins_with_its_first_batch_and_not_with_a_pass():
    sampler = EpochSampler(plan(8, 2), seed=0)
    first = list(EpochSampler(sampler.plan, seed=0))
    unused, cut_short = iter(sampler), iter(sampler)
    assert next(cut_short) == first[0]
    assert list(sampler) == sampler.batches(1)
    assert list(unused) == first


def test_the_same_order_can_be_kept():
    sampler = EpochSampler(plan(8, 2), seed=0, same_order=True)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"batch_size": 3}, "data.init_args.batch_size was 2 and is 3"),
        ({"examples": 9}, "training examples was 8 (lengths "),
        ({"ranks": 2}, "number of devices was 1 and is 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_of_other_batches_is_refused(other: Mapping[str, Any], difference: str):
    state = EpochSampler(plan(8, 2), seed=0).state_dict()
    options = {"examples": 8, "batch_size": 2, "ranks": 1, **other}
    sampler = EpochSampler(plan(**options), seed=0)
    with refused("ckpt_path", reason=difference) as caught:
        sampler.load_state_dict(state)
    assert caught.value.reason.count(" was ") == 1


def names(batches: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [batch["id"] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_mid_epoch(tokenizer: PreTrainedTokenizerFast, workers: int):
    loader = built(tokenizer=tokenizer, batch_size=2, num_workers=workers).train_dataloader()
    assert loader.state_dict()["batch"] == 0
    first, iterator = names(list(loader)), iter(loader)
    assert loader.state_dict()["epoch"] == 1
    second, states = [], []
    for batch in iterator:
        second.append(batch["id"])
        states.append(stored(loader.state_dict()))
    assert sorted(flat(first)) == sorted(flat(second))
    for other_workers, taken in ((workers, 2), (2 - workers, 3), (0, 5)):
        # Neither the number of workers nor the run's later random state matters.
        resumed = built(tokenizer=tokenizer, batch_size=2, num_workers=other_workers).train_dataloader()
        resumed.load_state_dict(states[taken - 1])
        assert resumed.state_dict() == (states[taken - 1] if taken < 5 else {**states[4], "epoch": 2, "batch": 0})
        rest = names(list(resumed))
        assert rest == (second[taken:] if taken < 5 else names(list(loader)))


def test_loading_batches_leaves_the_random_state_alone(tokenizer: PreTrainedTokenizerFast):
    before = torch.get_rng_state()
    data = built(tokenizer=tokenizer)
    list(data.train_dataloader()), list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


class Seen(LightningModule):
    """Keeps the ids it is trained on, and checkpoints at a step."""

    def __init__(self, save: Mapping[int, str] = {}) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save = save
        self.seen: list[list[str]] = []

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        self.seen.append(batch["id"])
        return self.layer(batch["input_ids"][:1, :1].float()).sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if path := self.save.get(self.trainer.global_step):
            self.trainer.save_checkpoint(path)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(data: Words, module: Seen, ckpt_path: str | None = None, **options: Any) -> list[list[str]]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(enable_checkpointing=False, **{"max_steps": 14, **quiet, **options})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize(
    ("workers", "limits"),
    [(0, {}), (2, {}), (0, {"limit_train_batches": 4}), (2, {"limit_train_batches": 0.8})],
    ids=["no workers", "workers", "shorter epochs", "shorter epochs with workers"],
)
def test_a_fit_goes_on_mid_epoch_and_at_the_end_of_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Any, workers: int, limits: dict[str, Any]
):
    options = {"tokenizer": tokenizer, "batch_size": 2, "num_workers": workers}
    save = {step: str(tmp_path / f"{step}.ckpt") for step in (2, 4, 5, 7, 8, 10)}
    torch.manual_seed(3)
    whole = trained(Words(**options), Seen(save), **limits)
    assert len(whole) == 14
    for step, path in save.items():
        torch.manual_seed(4)
        assert trained(Words(**options), Seen(), path, **limits) == whole[step:]


def test_an_epoch_that_is_cut_short_is_not_begun_again(tokenizer: PreTrainedTokenizerFast):
    torch.manual_seed(0)
    seen = trained(Words(tokenizer=tokenizer), Seen(), limit_train_batches=3, max_steps=9)
    order = plan(10, 1)
    assert seen == [[f"train{10 * n}"] for epoch in range(3) for (n,) in order.batches(0, epoch)[:3]]


def test_overfitting_sees_the_same_batches_again(tokenizer: PreTrainedTokenizerFast):
    seen = trained(Words(tokenizer=tokenizer), Seen(), overfit_batches=2, max_steps=6)
    assert seen == seen[:2] * 3


class Steps(Seen):
    """Keeps the sizes of the examples of each optimizer step: those that it sees, and those that its batches name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, tuple[list[Any], list[list[Any]]]] = {}

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        seen, named = self.steps.setdefault(self.trainer.global_step, ([], []))
        seen.extend(batch["sizes"])
        named.append(batch["step_sizes"])
        return super().training_step(batch)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4, 4, 2]),
        ({"limit_train_batches": 3}, [4, 2]),
        ({"limit_train_batches": 0.7}, [4, 2]),
        ({"overfit_batches": 3}, [4, 2]),
        ({"overfit_batches": 0.7}, [4, 2]),
        ({"fast_dev_run": 3}, [4, 2]),
        ({"limit_train_batches": 9, "accumulate_grad_batches": 9}, [10]),
    ],
    ids=str,
)
def test_a_step_consists_of_what_its_batches_say(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], expected: list[int]
):
    """The last one of an epoch as well, which has fewer; two epochs of it, but for a dry run."""
    module, epochs = Steps(), 1 if "fast_dev_run" in options else 2
    data = Words(tokenizer=tokenizer, batch_size=2)
    trained(data, module, **{"accumulate_grad_batches": 2, "max_steps": epochs * len(expected), **options})
    assert [len(seen) for seen, _ in module.steps.values()] == expected * epochs
    for seen, named in module.steps.values():
        assert all(sorted(each) == sorted(seen) for each in named)


def test_steps_of_changing_numbers_of_batches_are_refused(tokenizer: PreTrainedTokenizerFast):
    with refused("callbacks", "GradientAccumulationScheduler"):
        trained(Words(tokenizer=tokenizer), Seen(), callbacks=[GradientAccumulationScheduler({1: 2})])
