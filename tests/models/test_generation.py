"""Where an answer ends."""

from __future__ import annotations

from lrsa_lit.models.generation import before_stop, stop_tokens
from lrsa_lit.models.tiny import tiny_tokenizer


def test_every_special_token_ends_an_answer():
    tokenizer = tiny_tokenizer()
    assert stop_tokens(tokenizer) == [0, 1, 2]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"], "pad_token": "<|pad|>"})
    tools, pad = tokenizer.convert_tokens_to_ids(["<|tool|>", "<|pad|>"])
    assert set(stop_tokens(tokenizer)) == {0, 1, 2, tools, pad}


def test_a_base_models_one_special_token_ends_an_answer():
    tokenizer = tiny_tokenizer()
    for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, "<|endoftext|>")
    assert stop_tokens(tokenizer) == [tokenizer.eos_token_id] == [0]


def test_tokens_before_the_first_stop():
    assert before_stop([5, 0, 6, 2, 7, 1], [1, 2]) == [5, 0, 6]
    assert before_stop([1, 5], [1, 2]) == []
    assert before_stop([5, 6], [1, 2]) == [5, 6]
