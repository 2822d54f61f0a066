"""A tiny model in float64, batches, and what its logits are when they are made whole."""

import pytest
import torch

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.data.collate import collate_packed, collate_training
from lrsa_lit.models.tiny import tiny_model

RULE = LRSAConfig(sink_size=2, lag_size=16, top_k=4)


def example(prompt, answer, name):
    generator = torch.Generator().manual_seed(prompt * 100 + answer)
    ids = torch.randint(3, 259, (prompt + answer,), generator=generator).tolist()
    return {"id": name, "input_ids": ids, "prompt_length": prompt, "gold_spans": [], "answer_spans": [],
            "answers": ["an answer"], "match": "any"}  # fmt: skip


EXAMPLES = [example(70, 3, "a"), example(41, 6, "b"), example(95, 1, "c"), example(60, 4, "d")]
BATCHES = {"padded": lambda examples: collate_training(examples, 2), "packed": collate_packed}


@pytest.fixture
def model():
    return enable(tiny_model().double(), RULE)


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param](EXAMPLES)
