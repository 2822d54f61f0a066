"""A small random model that systems are enabled on."""

from typing import Any

import pytest
import torch
from helpers import narrowed
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> Any:
    """Three layers, four query heads over two key-value heads, float64; tests restore its own attention.

    With ``--low-rank`` its keys and values come from latents, like those of all small random models.
    """
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).double().eval()
    grouping = pytestconfig.getoption("low_rank")
    return narrowed(made, grouping) if grouping else made


@pytest.fixture
def ids() -> Any:
    """Draws token ids (rows, tokens), none of them special."""
    return lambda *shape: torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0))
