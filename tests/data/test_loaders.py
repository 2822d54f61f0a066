"""Loaders as the data modules make them: packing, grouping and curricula, with workers, on several devices."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_helpers import BARE, LENGTHS, Words, built
from helpers import refused
from lightning import Trainer
from torch.utils.data.distributed import DistributedSampler
from transformers import PreTrainedTokenizerFast

from lrsa_lit.data.collate import IGNORE_INDEX
from lrsa_lit.data.loaders import TrainerSettings
from lrsa_lit.data.module import Split
from lrsa_lit.data.plan import Stage
from lrsa_lit.data.policies import Packed

LONGEST = BARE + max(LENGTHS["train"])
STAGES = [Stage(BARE + 40, until_step=6), Stage(LONGEST)]
WAYS = {
    "packed": {"packing": Packed(LONGEST + BARE)},
    "grouped": {"batch_size": 3, "group_by_length": True},
    "curriculum": {"batch_size": 2, "curriculum": STAGES},
    "packed curriculum": {"packing": Packed(LONGEST + BARE), "curriculum": STAGES},
}


def plain(batch: dict[str, Any]) -> str:
    """A batch in a form that compares."""
    return str({name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_of_batching_goes_on_exactly(tokenizer: PreTrainedTokenizerFast, way: dict[str, Any], workers: int):
    options = {"tokenizer": tokenizer, "num_workers": workers, **way}
    loader = built(**options).train_dataloader()
    batches, states = [], []
    for _ in range(3):
        for batch in loader:
            batches.append(plain(batch))
            states.append(loader.state_dict())
    assert len(batches) == 3 * len(loader)
    middle = len(loader) + 2
    resumed = built(**options).train_dataloader()
    resumed.load_state_dict(states[middle - 1])
    assert [plain(batch) for _ in range(2) for batch in resumed] == batches[middle:]


def test_a_packed_loader_yields_one_row_of_several_examples(tokenizer: PreTrainedTokenizerFast):
    budget = 2 * LONGEST
    data = built(tokenizer=tokenizer, packing=Packed(budget))
    batches = list(data.train_dataloader())
    assert sorted(name for batch in batches for name in batch["id"]) == sorted(f"train{n}" for n in LENGTHS["train"])
    for batch in batches:
        assert batch["input_ids"].shape == (1, batch["boundaries"][-1])
        assert batch["boundaries"][-1] <= budget
        assert len(batch["boundaries"]) == len(batch["id"]) + 1
    tokens = sum(batch["boundaries"][-1] for batch in batches)
    assert data.padding == pytest.approx(1 - tokens / (budget * len(batches)))
    assert all(batch["boundaries"] is None for batch in data.val_dataloader())


def test_padding_is_said_once_and_kept(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture):
    data = built(tokenizer=tokenizer, batch_size=4)
    assert data.padding is None
    # Whether opening the data was logged is up to the tests before this one.
    caplog.clear()
    with caplog.at_level(logging.INFO, "lrsa_lit.data"):
        batches = list(data.train_dataloader())
    masks = [batch["attention_mask"] for batch in batches]
    assert data.padding == pytest.approx(1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))
    assert caplog.messages == [f"Words train: 3 batches an epoch, {100 * data.padding:.1f} % padding"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "lrsa_lit.data"):
        data = built(tokenizer=tokenizer, packing=Packed(LONGEST))
        data.train_dataloader()
    assert caplog.messages[-1].endswith(f" batches an epoch, {100 * data.padding:.1f} % of the budget unused")


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (
            {"packing": Packed(LONGEST - 1)},
            ("packing.tokens", LONGEST - 1, f"{LONGEST} or more"),
        ),
        (
            {"curriculum": [Stage(BARE - 1, until_step=9), Stage(LONGEST)]},
            ("curriculum.0.max_tokens", BARE - 1, f"{BARE} or more"),
        ),
    ],
    ids=["packing", "curriculum"],
)
def test_what_does_not_suit_the_examples_is_refused_before_training(
    tokenizer: PreTrainedTokenizerFast, way: dict[str, Any], told: tuple[str, int, str]
):
    with refused(*told):
        Words(tokenizer=tokenizer, **way).prepare_data("fit")
    Words(tokenizer=tokenizer, **way).prepare_data("test")


def test_how_batches_are_made_does_not_decide_the_examples(tokenizer: PreTrainedTokenizerFast):
    fingerprints = {Words(tokenizer=tokenizer, **way).fingerprint for way in ({}, *WAYS.values())}
    assert len(fingerprints) == 1


def on_rank(rank: int, ranks: int) -> SimpleNamespace:
    """What a data module asks of a trainer on one of several devices."""
    shared = {"rank": rank, "num_replicas": ranks} if ranks > 1 else None
    return SimpleNamespace(
        distributed_sampler_kwargs=shared,
        strategy=None,
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        overfit_batches=0.0,
        callbacks=[],
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )


@pytest.mark.parametrize("way", [{"batch_size": 2}, *WAYS.values()], ids=["plain", *WAYS.keys()])
def test_devices_share_the_training_batches(tokenizer: PreTrainedTokenizerFast, way: dict[str, Any]):
    seen = []
    for rank in range(3):
        data = built(tokenizer=tokenizer, **way)
        data.trainer = on_rank(rank, 3)
        seen.append([batch["id"] for batch in data.train_dataloader()])
    assert len({len(batches) for batches in seen}) == 1
    if "curriculum" not in way:
        names = [name for batches in seen for batch in batches for name in batch]
        assert sorted(names) == sorted(f"train{n}" for n in LENGTHS["train"])


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_devices_share_the_batches_of_an_evaluation(
    tokenizer: PreTrainedTokenizerFast, ranks: int, size: int, split: Split
):
    names = [f"{split}{n}" for n in LENGTHS[split]]
    expected = [(start, names[start : start + size]) for start in range(0, len(names), size)]
    shares, counted = [], []
    for rank in range(ranks):
        data = built(tokenizer=tokenizer, eval_batch_size=size)
        data.trainer = on_rank(rank, ranks)
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        batches = list(loader)
        shares.append(len(batches))
        assert len(loader) == len(batches)
        counted += [(batch["position"][0], batch["id"]) for batch in batches if not any(batch["repeated"])]
        assert all(all(batch["repeated"]) for batch in batches if any(batch["repeated"]))
    assert len(set(shares)) == 1
    # The batches, and so their answers, are the same for any number of devices.
    assert sorted(counted) == expected


def test_devices_that_share_training_batches_answer_questions_of_their_own(tokenizer: PreTrainedTokenizerFast):
    trained, asked = [], []
    for rank in range(4):
        data = built(tokenizer=tokenizer)
        data.trainer = on_rank(rank // 2, 2)
        data.trainer.strategy = SimpleNamespace(evaluation_sampler_kwargs={"rank": rank, "num_replicas": 4})
        trained.append([batch["id"] for batch in data.train_dataloader()])
        asked += [batch["id"] for batch in data.test_dataloader() if not any(batch["repeated"])]
    assert trained[0] == trained[1] != trained[2] == trained[3]
    assert sorted(asked) == sorted([f"test{n}"] for n in LENGTHS["test"])


def test_batches_of_one_length_on_request(tokenizer: PreTrainedTokenizerFast):
    plain, padded = (
        list(built(tokenizer=tokenizer, batch_size=3, pad_to_longest=longest).train_dataloader())
        for longest in (False, True)
    )
    longest = BARE + max(LENGTHS["train"])
    assert {batch["input_ids"].shape[1] for batch in padded} == {-(-longest // 64) * 64}
    for one, other in zip(plain, padded, strict=True):
        length = one["input_ids"].shape[1]
        assert one["id"] == other["id"]
        assert one["label_columns"].equal(other["label_columns"])
        assert one["input_ids"].equal(other["input_ids"][:, :length])
        assert (other["labels"][:, length:] == IGNORE_INDEX).all()


def test_lightning_must_not_divide_batches_again(tokenizer: PreTrainedTokenizerFast):
    data = built(tokenizer=tokenizer)
    data.trainer = on_rank(0, 2)
    data.trainer._accelerator_connector.use_distributed_sampler = True
    with refused("use_distributed_sampler", True):
        data.train_dataloader()


def test_lightning_leaves_the_evaluation_alone(tokenizer: PreTrainedTokenizerFast):
    data = built(tokenizer=tokenizer)
    assert isinstance(data.test_dataloader().sampler, DistributedSampler)


@pytest.mark.parametrize(
    ("options", "batches", "same"),
    [
        ({}, 8, False),
        ({"limit_train_batches": 1}, 1, False),
        ({"limit_train_batches": 9}, 8, False),
        ({"limit_train_batches": 0.5}, 4, False),
        ({"overfit_batches": 2}, 2, True),
    ],
    ids=str,
)
def test_what_a_trainer_decides(options: dict[str, Any], batches: int, same: bool):
    settings = TrainerSettings.of(Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=3, **options))
    assert (settings.rank, settings.ranks, settings.batches_a_step, settings.same_order) == (0, 1, 3, same)
    assert settings.batches_of(8) == batches


def test_a_curriculum_needs_whole_epochs(tokenizer: PreTrainedTokenizerFast):
    data = built(tokenizer=tokenizer, curriculum=STAGES)
    data.trainer = on_rank(0, 1)
    data.trainer.limit_train_batches = 3
    with refused("curriculum"):
        data.train_dataloader()
