from collections import Counter
from typing import Any

import pytest
import torch
from data_helpers import BARE, LENGTHS, Words
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.mixture import Mixture
from lrsa_lit.data.module import Split
from lrsa_lit.data.order import Mixed, shares
from lrsa_lit.data.policies import Packed

TRAIN = len(LENGTHS["train"])


class TestOnly(Words):
    """Has nothing to train on."""

    __test__ = False

    def splits(self) -> tuple[Split, ...]:
        return ("test",)


def mixture(weights: dict[str, float], **options: Any) -> Mixture:
    return Mixture({name: Words(word=name) for name in weights}, weights, **options)


def opened(data: Mixture) -> Mixture:
    data.prepare_data()
    data.setup()
    return data


def names(loader: Any) -> list[str]:
    return [name for batch in loader for name in batch["id"]]


@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=5), st.integers(0, 200))
def test_shares_are_as_near_as_whole_numbers_can_be(weights, total):
    parts = shares(weights, total)
    assert sum(parts) == total
    assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(parts, weights, strict=True))


counts_and_quotas = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4)


@given(counts_and_quotas, st.integers(0, 3))
def test_an_epoch_has_its_quota_of_each_and_all_examples_are_used_alike(parts, seed):
    order = Mixed(*map(tuple, zip(*parts, strict=True)))
    seen: Counter[int] = Counter()
    for epoch in range(4):
        drawn = order(seed, epoch)
        seen.update(drawn)
        start = 0
        for count, quota in parts:
            assert sum(start <= position < start + count for position in drawn) == quota
            uses = [seen[position] for position in range(start, start + count)]
            assert max(uses) - min(uses) <= 1
            start += count


def test_the_order_is_decided_by_seed_and_epoch_alone():
    order = Mixed((20, 30), (10, 5))
    order(7, 7)
    assert order(1, 4) == Mixed((20, 30), (10, 5))(1, 4)
    assert len({str(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_training_takes_shares_and_evaluation_takes_all(tokenizer):
    data = opened(mixture({"x": 3, "yy": 1}, tokenizer=tokenizer, examples_per_epoch=8))
    assert len(data.train_dataloader()) == 8
    lengths = [batch["input_ids"].shape[1] - BARE for batch in data.train_dataloader()]
    assert len(lengths) == 8
    rows = [row for batch in data.val_dataloader() for row in zip(batch["source"], batch["id"], strict=True)]
    assert rows == [(name, f"val{n}") for name in ("x", "yy") for n in LENGTHS["val"]]
    assert data.report["train"] == {"x/kept": TRAIN, "yy/kept": TRAIN}
    assert data.fingerprint.startswith("Mixture-")


def test_an_epoch_is_as_long_as_the_data_sets_unless_said(tokenizer):
    data = opened(mixture({"x": 3, "yy": 1, "z": 0}, tokenizer=tokenizer))
    assert len(data.train_dataloader()) == 2 * TRAIN
    assert len(names(data.test_dataloader())) == 3 * len(LENGTHS["test"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", [{"batch_size": 3}, {"packing": Packed(2 * BARE + 300)}], ids=["plain", "packed"])
def test_a_mixture_goes_on_exactly(tokenizer, way, workers):
    def loader() -> Any:
        options = {"examples_per_epoch": 15, "num_workers": workers, **way}
        return opened(mixture({"x": 3, "yy": 1}, tokenizer=tokenizer, **options)).train_dataloader()

    whole = loader()
    batches, states = [], []
    for _ in range(3):
        for batch in whole:
            batches.append(batch["input_ids"].tolist())
            states.append(whole.state_dict())
    middle = len(whole) + 1
    resumed = loader()
    resumed.load_state_dict(states[middle - 1])
    assert [batch["input_ids"].tolist() for _ in range(2) for batch in resumed] == batches[middle:]


def test_other_shares_are_other_batches(tokenizer):
    state = opened(mixture({"x": 3, "yy": 1}, tokenizer=tokenizer)).train_dataloader().state_dict()
    other = opened(mixture({"x": 1, "yy": 1}, tokenizer=tokenizer)).train_dataloader()
    with refused("ckpt_path", reason="examples of each data set in an epoch was 15, 5 and is 10, 10"):
        other.load_state_dict(state)


def test_evaluation_can_be_of_chosen_data_sets(tokenizer):
    data = opened(mixture({"x": 3, "yy": 1}, tokenizer=tokenizer, evaluate_on=["yy"]))
    assert {name for batch in data.val_dataloader() for name in batch["source"]} == {"yy"}
    assert mixture({"x": 3, "yy": 1}, evaluate_on=[]).splits() == ("train",)


def test_a_data_set_that_is_only_evaluated_needs_no_weight(tokenizer):
    parts = {"x": Words(), "y": TestOnly()}
    data = opened(Mixture(parts, {"x": 1, "y": 0}, tokenizer=tokenizer))
    assert len(names(data.train_dataloader())) == TRAIN
    assert len(names(data.test_dataloader())) == 2 * len(LENGTHS["test"])


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"weights": {"x": 1}}, "weights.yy", None),
        ({"weights": {"x": 1, "yy": 1, "z": 1}}, "weights", "z"),
        ({"evaluate_on": ["z"]}, "evaluate_on", "z"),
        ({"weights": {"x": 1, "yy": -1}}, "weights.yy", -1),
        ({"weights": {"x": 0, "yy": 0}}, "weights", {"x": 0, "yy": 0}),
        ({"examples_per_epoch": 0}, "examples_per_epoch", 0),
        ({"data_sets": {"x": Words(max_tokens=2000), "yy": Words()}}, "data_sets.x.max_tokens", 2000),
        ({"data_sets": {"x": Words(batch_size=4), "yy": Words()}}, "data_sets.x.batch_size", 4),
        ({"data_sets": {"x": Words(), "yy": mixture({"z": 1})}}, "data_sets.yy", None),
        ({"data_sets": {"x": Words(), "yy": TestOnly()}}, "weights.yy", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_mixture_is_refused_at_once(change, field, value):
    options = {"data_sets": {"x": Words(), "yy": Words()}, "weights": {"x": 1, "yy": 1}, **change}
    with refused(field, value):
        Mixture(**options)


def test_a_share_of_less_than_one_example_is_refused(tokenizer):
    data = opened(mixture({"x": 999, "yy": 1}, tokenizer=tokenizer, examples_per_epoch=10))
    with refused("weights.yy", 1):
        data.train_dataloader()


def test_a_seed_has_the_batches_that_published_runs_were_trained_on(tokenizer):
    sets = {"a": Words(word="x"), "b": Words(word="y"), "c": Words(word="z", limit={"train": 7})}
    data = Mixture(sets, {"a": 0.7, "b": 0, "c": 0.3}, batch_size=4, pad_to_longest=True, tokenizer=tokenizer)
    data.prepare_data("fit")
    data.setup("fit")
    torch.manual_seed(3)
    loader = data.train_dataloader()
    batches = [batch for _ in range(2) for batch in loader]
    # As recorded when the study on robustness was run.
    assert [[int(name.removeprefix("train")) for name in batch["id"]] for batch in batches] == [
        [0, 10, 10, 50], [70, 30, 60, 20], [80, 10, 50, 90], [30, 0, 40, 80], [60],
        [90, 40, 30, 20], [30, 0, 20, 50], [20, 60, 50, 0], [40, 70, 40, 60], [10],
    ]  # fmt: skip
    assert {batch["input_ids"].shape[1] for batch in batches} == {256}
