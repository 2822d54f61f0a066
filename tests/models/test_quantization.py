"""A base of 4 bits below the adapters."""

import importlib.util

import pytest
import torch
from helpers import refused

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.flops import Shape
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=4)
IDS = torch.randint(3, 259, (1, 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    tiny_model(seed=3).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_only_the_adapters_train_and_the_base_is_packed(folder):
    pytest.importorskip("bitsandbytes")
    plain = Backbone(folder, lora=LoRA(rank=4)).build()
    model = enable(Backbone(folder, lora=LoRA(rank=4), quantization="nf4", gradient_checkpointing=True).build(), RULE)
    packed = [weight for weight in model.parameters() if weight.dtype == torch.uint8]
    assert len(packed) == 2 * 7
    assert Shape.of(model) == Shape.of(plain)
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_the_base_is_the_models_own_rounded_to_four_bits(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = Backbone(folder, lora=LoRA(rank=4), quantization="nf4").build()
    weight = model.get_base_model().model.layers[1].mlp.up_proj.weight
    found = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    expected = tiny_model(seed=3).model.layers[1].mlp.up_proj.weight
    assert 0 < (found - expected).norm() / expected.norm() < 0.15


def test_what_does_not_go_together():
    with refused("quantization", "nf4", reason="lora"):
        Backbone("some/model", quantization="nf4")
    with refused("quantization", "nf4", reason="random weights"):
        Backbone("tiny", quantization="nf4", lora=LoRA())


def test_without_bitsandbytes(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with refused("quantization", "nf4", reason="pip install 'lrsa-lit[qlora]'"):
        Backbone("some/model", quantization="nf4", lora=LoRA())
