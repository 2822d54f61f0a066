"""A model is loaded whole or not at all: no weight is drawn at random in place of one that a folder lacks."""

import json
import logging

import pytest
import torch
from helpers import one_line, refused
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.loading import system_errors
from lrsa_lit.models.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, what):
    path = folder / "model.safetensors"
    save_file(what(load_file(path)), path, {"format": "pt"})


def build(folder):
    return Backbone(str(folder)).build()


def test_renamed_weights_are_missing(folder):
    change(folder, lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()})
    with refused("source", str(folder), reason="21 weights, such as lm_h"):
        build(folder)


def test_one_missing_weight(folder):
    change(folder, lambda weights: {name: weight for name, weight in weights.items() if "norm" not in name})
    with refused("source", str(folder), reason="5 weights"):
        build(folder)


def test_another_shape(folder):
    change(folder, lambda weights: weights | {"model.norm.weight": torch.ones(3)})
    with refused("source", str(folder), reason="model.norm.weight: (3,) instead"):
        build(folder)


def test_weights_without_a_place_are_said(folder, caplog):
    change(folder, lambda weights: weights | {"v_head.weight": torch.ones(3)})
    with caplog.at_level(logging.WARNING):
        build(folder)
    assert "v_head.weight" in caplog.text


def test_a_whole_model_is_loaded_without_a_word(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO):
        build(folder)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []


def test_a_tied_head_is_not_missing(tmp_path):
    config = tiny_config()
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = build(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


CONTRADICTIONS = {
    "hidden_size": [63, 0, -64, 2**40, "64", None, 1.5, []],
    "num_hidden_layers": [3, 1, 0, -1, 10**9, "2", None],
    "num_attention_heads": [3, 0, -4, 10**9, "4"],
    "num_key_value_heads": [3, 0, -2, 5, "2"],
    "intermediate_size": [0, -1, 2**40, "x"],
    "vocab_size": [10, 0, -1, 2**40, "x"],
    "head_dim": [0, -1, 7, 2**40, "x"],
    "max_position_embeddings": [-1, 0, "x"],
    "hidden_act": ["nothing", 3, None],
    "model_type": ["nothing", 3, None, "bert", ""],
    "rope_parameters": [[], {"rope_type": "nothing"}, "x", {"rope_type": "yarn"}],
    "rms_norm_eps": ["x"],
    "dtype": ["nothing", 3],
    "architectures": ["x", [3]],
    "quantization_config": [{}, {"quant_method": "nothing"}, "x"],
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_a_config_that_contradicts_itself_is_one_line(folder, key):
    """Or it says nothing that a model of these weights depends on: then the model is what it was."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    ids = torch.arange(20)[None]
    expected = build(folder)(ids).logits
    for value in CONTRADICTIONS[key]:
        path.write_text(json.dumps(config | {key: value}))
        try:
            found = Backbone(str(folder))
            _ = found.config, found.tokenizer
            model = found.build()
        except UserError as error:
            one_line(error)
        else:
            assert torch.equal(model(ids).logits, expected), value


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_damaged_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    with refused("source", str(folder)):
        _ = Backbone(str(folder)).tokenizer, build(folder)


def test_a_folder_of_adapters_is_no_backbone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("source", str(tmp_path), "whole model"):
        build(tmp_path)


@pytest.mark.parametrize("modules", ["(", ["nothing"], "nothing", []])
def test_adapters_for_what_is_not_there(modules):
    with refused("lora.target_modules"):
        Backbone("tiny", lora=LoRA(target_modules=modules)).build()


def test_errors_of_libraries_in_rust_are_the_systems():
    with pytest.raises(OSError, match="No space left") as error, system_errors():
        raise Exception("IoError: No space left on device (os error 28)")
    assert error.value.errno == 28
    with pytest.raises(KeyError), system_errors():
        raise KeyError("a bug")
