from itertools import pairwise

import pytest
import torch
from data_helpers import example, examples
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.data.collate import TrainBatch, collate_packed, collate_training
from lrsa_lit.models.tiny import tiny_model

packs = st.lists(examples(), min_size=1, max_size=5)


def test_a_packed_row_by_hand():
    batch = collate_packed([example([1, 2, 3], [4, 5], "x"), example([6], [7], "y")])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 7]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 5, -100, 7]]
    assert batch["label_columns"].tolist() == [2, 3, 5]
    assert batch["boundaries"] == [0, 5, 7]
    assert batch["id"] == ["x", "y"]
    # No example rejects an answer or says where its context is.
    assert set(batch) == set(TrainBatch.__annotations__) - {"rejected", "contexts"}


@given(packs)
def test_a_packed_row_holds_its_examples_and_nothing_else(examples):
    batch = collate_packed(examples)
    spans = list(pairwise(batch["boundaries"]))
    for (start, stop), item in zip(spans, examples, strict=True):
        alone = collate_training([item], 0)
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name][:, start:stop], alone[name])
        assert batch["position_ids"][0, start:stop].tolist() == list(range(stop - start))
    assert batch["boundaries"][-1] == batch["input_ids"].shape[1]
    assert all(type(place) is int for place in batch["boundaries"])


def test_no_first_token_is_learnt_from_the_example_before():
    everything_is_an_answer = example([], [1, 2])
    batch = collate_packed([everything_is_an_answer] * 2)
    assert batch["labels"].tolist() == [[-100, 2, -100, 2]]
    assert batch["label_columns"].tolist() == [0, 2]


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels", "position_ids", "label_columns"])
def test_tensors_are_int64(name):
    assert collate_packed([example([1], [2])])[name].dtype == torch.int64


def test_a_model_answers_in_a_packed_row_as_it_does_alone():
    rule = LRSAConfig(sink_size=2, lag_size=4, top_k=2)
    model = enable(tiny_model(), rule).eval()
    items = [example([5, 6, 7] * 9, [8, 9]), example([9, 8] * 11, [7]), example([3, 4], [5, 6])]
    packed = collate_packed(items)
    boundaries = torch.tensor(packed["boundaries"], dtype=torch.int32)
    logits = model(
        input_ids=packed["input_ids"], position_ids=packed["position_ids"], cu_seq_lens_q=boundaries, use_cache=False
    ).logits
    for (start, stop), item in zip(pairwise(packed["boundaries"]), items, strict=True):
        alone = model(input_ids=collate_training([item], 0)["input_ids"], use_cache=False).logits
        torch.testing.assert_close(logits[:, start:stop], alone, rtol=1e-4, atol=1e-4)
