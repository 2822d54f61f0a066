import pytest
import torch
from data_helpers import example, examples
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.data.collate import TrainBatch, collate, collate_training

PAD = 0
batches = st.lists(examples(), min_size=1, max_size=4)


def test_a_batch_by_hand():
    batch = collate([example([1, 2, 3], [4, 5], "x"), example([6], [7], "y")], PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5], [-100, 7, -100, -100, -100]]
    assert batch["label_columns"].tolist() == [0, 2, 3]
    assert batch["position_ids"] is batch["boundaries"] is None
    assert batch["prompt_ids"].tolist() == [[1, 2, 3], [0, 0, 6]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["prompt_length"] == batch["first_turn"] == batch["context_length"] == [3, 1]
    assert batch["gold_spans"] == [[(0, 1)], [(0, 1)]]
    assert batch["answer_spans"] == [[], []]
    assert batch["id"] == ["x", "y"]
    assert batch["answers"] == [("a", "b")] * 2
    assert batch["match"] == ["any"] * 2


@given(batches)
def test_masks_recover_what_went_in(examples):
    batch = collate(examples, PAD)
    for row, item in enumerate(examples):
        tokens, mask = batch["input_ids"][row], batch["attention_mask"][row].bool()
        length = item["prompt_length"]
        assert tokens[mask].tolist() == item["input_ids"]
        assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == item["input_ids"][:length]
        learnt = batch["labels"][row] != -100
        assert tokens[learnt].tolist() == item["input_ids"][length:]
        assert torch.equal(batch["labels"][row][learnt], tokens[learnt])


@given(batches)
def test_logits_are_needed_where_the_next_token_of_some_row_is_learnt(examples):
    batch = collate_training(examples, PAD)
    needed = {j - 1 for row in batch["labels"].tolist() for j, label in enumerate(row) if label != -100 and j}
    assert batch["label_columns"].tolist() == sorted(needed)


@given(batches)
def test_a_training_batch_is_the_same_without_what_only_evaluation_needs(examples):
    training, evaluation = collate_training(examples, PAD), collate(examples, PAD)
    assert set(training) == set(TrainBatch.__annotations__) - {"rejected"}
    assert all(str(training[name]) == str(evaluation[name]) for name in training)


@given(batches)
def test_padding_is_on_the_right_for_training_and_on_the_left_for_generation(examples):
    batch = collate(examples, PAD)
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert (batch["prompt_mask"].diff(dim=1) >= 0).all()
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    assert batch["prompt_mask"].sum(1).max() == batch["prompt_ids"].shape[1]


@pytest.mark.parametrize(
    "name", ["input_ids", "attention_mask", "labels", "prompt_ids", "prompt_mask", "label_columns"]
)
def test_tensors_are_int64(name):
    assert collate([example([1], [2])], PAD)[name].dtype == torch.int64


def test_the_examples_are_left_alone():
    item = example([1, 2], [3])
    collate([item], PAD)
    assert item["input_ids"] == [1, 2, 3]
