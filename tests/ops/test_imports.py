"""What importing the operator brings along, seen from a fresh interpreter."""

import pytest
from helpers import modules_after


@pytest.fixture(scope="module")
def loaded():
    return modules_after(
        "import torch\n"
        "from lrsa_lit.ops.sparse_attention import Rule, sparse_attention\n"
        "from lrsa_lit.ops.sparse_attention import stream\n"
        "x = torch.randn(1, 1, 20, 4)\n"
        "sparse_attention(x, x, x, Rule(1, 4, 2))"
    )


@pytest.mark.parametrize("name", ["transformers", "lightning", "triton", "peft", "datasets", "mlflow"])
def test_running_the_operator_does_not_import(name, loaded):
    assert {"torch", "lrsa_lit"} <= loaded, "the probe must have run"
    assert name not in loaded
