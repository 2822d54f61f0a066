"""Models with random weights, in memory or in a folder, tokens for them, and the time of a token."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import median
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrsa_lit.models import Backbone, RopeScaling
from lrsa_lit.models.tiny import tiny_tokenizer

SHAPES = Path(__file__).parent / "shapes"
WORDS = (
    "river", "lake", "town", "road", "bridge", "tower", "garden", "market", "harbour", "castle", "forest", "island",
    "valley", "mill", "station", "school",
)  # fmt: skip
"""The words of documents."""

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


def write_model(shape: str, folder: Path, positions: int) -> Path:
    """Write random weights of a folder of ``shapes/``, with at least so many positions, and a tokenizer of words."""
    backbone = Backbone(str(SHAPES / shape), dtype="bfloat16", random_weights=True)
    if (factor := positions / backbone.config.max_position_embeddings) > 1:
        scaling = RopeScaling("yarn", float(-(-factor // 1)))
        backbone = Backbone(str(SHAPES / shape), dtype="bfloat16", random_weights=True, rope_scaling=scaling)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = backbone.build()
    tokenizer = word_tokenizer(backbone.config.vocab_size)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            # With logits of zero they are never the likeliest, so that answers are as long as asked for.
            part.weight[tokenizer.all_special_ids] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so many words, whose every token is text, with tiny's chat template."""
    tiny = tiny_tokenizer()
    special = tiny.unk_token, tiny.bos_token, tiny.eos_token
    names = [*special, *WORDS, *(f"word{number}" for number in range(size - len(special) - len(WORDS)))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=special[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": special[0], "bos_token": special[1], "eos_token": special[2], "pad_token": special[2]}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=tiny.chat_template, **named)
