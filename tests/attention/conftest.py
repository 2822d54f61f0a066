"""Small random models of each supported family, and batches for them."""

from typing import Any

import pytest
import torch
import transformers
from helpers import narrowed
from torch import Tensor

from lrsa_lit.attention import LRSAConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    # One rotary layer between layers without positions.
    "SmolLM3": {"no_rope_layers": [0, 1, 0]},
    "Granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
}


def build(
    family: str, head: str = "ForCausalLM", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> Any:
    """A random causal language model in evaluation mode; float64, so that equal outputs are equal to 1e-5.

    Norms and rotations are float32 inside transformers, so float64 weights do not give float64 logits.
    """
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **MORE.get(family, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, family + head)(config).to(dtype).eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def whole():
    """Makes models with whole projections, whatever the options."""
    return build


@pytest.fixture(scope="session")
def tiny(request):
    grouping = request.config.getoption("--low-rank")
    if grouping is None:
        return build
    return lambda *args, **options: narrowed(build(*args, **options), grouping)


@pytest.fixture(scope="session")
def tokens():
    return draw


@pytest.fixture(scope="session")
def rule() -> LRSAConfig:
    """Four partitions of 70 tokens are compressed, eight of 100."""
    return LRSAConfig(sink_size=2, lag_size=8, top_k=3)
