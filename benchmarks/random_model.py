"""A model of Llama-3.2-1B's shape with random weights, tokens for it, and the time of a token."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from timing import median
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NEW_TOKENS = 64
"""Tokens that are timed."""


def random_model(layers: int, device: str = "cuda") -> Any:
    """In bfloat16; on a CPU, which serves to try a benchmark, a small one of as many layers in float32."""
    torch.manual_seed(0)
    large = device == "cuda"
    config = LlamaConfig(
        vocab_size=128256 if large else 512,
        hidden_size=2048 if large else 64,
        intermediate_size=8192 if large else 128,
        num_hidden_layers=layers,
        num_attention_heads=32 if large else 4,
        num_key_value_heads=8 if large else 2,
        head_dim=64 if large else 16,
        max_position_embeddings=1 << 21,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    if large:
        # Casting the module would cast the rotary frequencies too.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def random_tokens(model: Any, count: int, rows: int = 1) -> Tensor:
    """(rows, ``count``) token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, count), generator=generator).to(model.device)


def per_token(step: Callable[[Tensor], Tensor], token: Tensor) -> float:
    """Milliseconds of one greedy token, median over NEW_TOKENS, compilation and capture left out."""
    token = token.clone()
    if not token.is_cuda:
        return median(lambda: token.copy_(step(token)[:, -1].argmax(-1, keepdim=True)), 3, graphed=False)
    times = []
    for _ in range(NEW_TOKENS + 8):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        token = step(token)[:, -1].argmax(-1, keepdim=True)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[8:])
