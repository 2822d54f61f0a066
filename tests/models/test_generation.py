"""Where an answer ends."""

from tokenizers import AddedToken

from lrsa_lit.models.generation import before_stop, stop_tokens
from lrsa_lit.models.tiny import tiny_tokenizer


def test_every_special_token_ends_an_answer():
    tokenizer = tiny_tokenizer()
    assert stop_tokens(tokenizer) == [0, 1, 2]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"], "pad_token": "<|pad|>"})
    tools, pad = tokenizer.convert_tokens_to_ids(["<|tool|>", "<|pad|>"])
    assert set(stop_tokens(tokenizer)) == {0, 1, 2, tools, pad}


def test_a_special_token_without_a_name_ends_an_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<file_sep>", special=True), AddedToken("plain")])
    separator = tokenizer.convert_tokens_to_ids("<file_sep>")
    assert tokenizer.decode([separator], skip_special_tokens=True) == ""
    assert stop_tokens(tokenizer) == [0, 1, 2, separator]


def test_one_token_with_several_names_is_there_once():
    tokenizer = tiny_tokenizer()
    for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, "<|endoftext|>")
    assert tokenizer.all_special_ids == [0]
    assert stop_tokens(tokenizer) == [0, 1, 2]


def test_tokens_before_the_first_stop():
    assert before_stop([5, 0, 6, 2, 7, 1], [1, 2]) == [5, 0, 6]
    assert before_stop([1, 5], [1, 2]) == []
    assert before_stop([5, 6], [1, 2]) == [5, 6]
