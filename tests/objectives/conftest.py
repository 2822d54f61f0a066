"""A tiny model in float64 with a rule, and a batch of examples."""

import pytest
from objective_helpers import BATCHES, EXAMPLES, RULE

from lrsa_lit.attention import enable
from lrsa_lit.models.tiny import tiny_model


@pytest.fixture
def model():
    return enable(tiny_model().double(), RULE)


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param](EXAMPLES)
