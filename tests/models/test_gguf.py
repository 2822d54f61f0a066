"""GGUF files: the tokenizer is what the file says, with every admitted version of transformers."""

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from lrsa_lit.data import fingerprint
from lrsa_lit.models import Backbone

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """That of a GGUF model of one layer with a byte-level BPE of two merges, converted."""
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "in", "\u0120in"]
    width, rows = 32, len(tokens)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64), writer.add_embedding_length(width), writer.add_block_count(1)
    writer.add_feed_forward_length(width), writer.add_head_count(2), writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(1e4), writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm"), writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (rows - len(SPECIAL)))
    writer.add_token_merges(["i n", "\u0120 in"])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_unk_token_id(0), writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"attn_q": (width, width), "attn_k": (16, width), "attn_v": (16, width), "attn_output": (width, width)}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (width, width))
    shapes |= dict.fromkeys(("attn_norm", "ffn_norm"), (width,))
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd": (rows, width), "output_norm": (width,), **shapes}.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return Backbone(str(path)).tokenizer


def test_the_special_tokens_are_those_that_the_file_names(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


@pytest.mark.parametrize("text", ["in  in it\n\n", "\u2581 \u2581in", "\u4e2d \u00fc<|im_end|> in"])
def test_text_is_what_it_was_after_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_version_of_transformers_makes_the_same_prompts(tokenizer, tmp_path):
    """The key of prepared data holds this digest: data prepared under one version is found under another."""
    digest = "28d8c25e62d354b1"
    assert fingerprint.of_tokenizer(tokenizer).startswith(digest)
    tokenizer.save_pretrained(tmp_path / "again")
    assert fingerprint.of_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "again")).startswith(digest)
