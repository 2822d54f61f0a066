"""What a model refuses while devices share its rows, before any of them waits for another one."""

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LAYOUT, LRSAConfig, enable, observing
from lrsa_lit.attention.layout import Layout
from lrsa_lit.context_parallel import SharedRows, Shares
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.systems import FreqKV

RULE = LRSAConfig(sink_size=2, lag_size=16, top_k=4)


@pytest.fixture
def inputs():
    shared = SharedRows(Shares.cut((0, 70), 2, RULE.rule), None)
    return {"input_ids": torch.full((1, 35), 5), "position_ids": torch.arange(35)[None], "use_cache": False,
            LAYOUT: Layout(shared=shared)}  # fmt: skip


def test_a_system_that_chooses_from_all_keys_is_refused_by_name(inputs):
    model = enable(tiny_model(), LRSAConfig(system=FreqKV()))
    with refused("context", reason="FreqKV selects from the keys of all devices"):
        model(**inputs)


def test_shared_rows_are_not_observed(inputs):
    model = enable(tiny_model(), RULE)
    with refused("context", reason="cannot be observed"), observing(model, lambda *_: None):
        model(**inputs)
