"""Rotary positions beyond the trained ones."""

import json

import pytest
import torch
from helpers import refused
from transformers import AutoModelForCausalLM

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.models import Backbone, RopeScaling
from lrsa_lit.models.checkpoint import describe, load_trained
from lrsa_lit.models.tiny import tiny_config, tiny_model, tiny_tokenizer

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


@pytest.fixture
def folder(tmp_path):
    tiny_model(seed=3, max_positions=64).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("parameters", [YARN, LINEAR], ids=["yarn", "linear"])
def test_logits_are_those_of_transformers_own_parameters(folder, parameters):
    scaling = RopeScaling(parameters["rope_type"], parameters["factor"])
    backbone = Backbone(folder, rope_scaling=scaling)
    positions = int(64 * parameters["factor"])
    assert backbone.config.max_position_embeddings == positions
    theirs = AutoModelForCausalLM.from_pretrained(folder, rope_parameters=parameters, max_position_embeddings=positions)
    ids = torch.randint(3, 259, (1, positions), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = backbone.build()(ids).logits
        assert torch.equal(ours, theirs(ids).logits)
        assert not torch.allclose(ours, tiny_model(seed=3, max_positions=64)(ids).logits, atol=1e-3)


def test_it_travels_in_the_saved_config_and_is_not_applied_twice(folder, tmp_path):
    backbone = Backbone(folder, rope_scaling=RopeScaling("yarn", 4))
    enable(backbone.build(), LRSAConfig(sink_size=2, lag_size=8, top_k=3)).save_pretrained(tmp_path / "trained")
    saved = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert saved["rope_parameters"] == YARN
    assert saved["max_position_embeddings"] == 256
    again = Backbone(str(tmp_path / "trained"), rope_scaling=RopeScaling("yarn", 4))
    assert again.config.max_position_embeddings == 256
    assert Backbone(str(tmp_path / "trained")).config.max_position_embeddings == 256
    with refused("rope_scaling", reason="yarn, factor 4.0, 256 positions"):
        _ = Backbone(str(tmp_path / "trained"), rope_scaling=RopeScaling("linear", 2)).config
    replaced = Backbone(str(tmp_path / "trained"), rope_scaling=RopeScaling("linear", 2, 64)).config
    assert replaced.rope_parameters == {**LINEAR, "factor": 2.0}
    assert replaced.max_position_embeddings == 128


def test_tiny_and_the_description_of_a_checkpoint(tmp_path):
    backbone = Backbone("tiny", rope_scaling=RopeScaling("yarn", 2))
    model = backbone.build()
    assert model.config.max_position_embeddings == 2 * tiny_config().max_position_embeddings
    assert model.model.rotary_emb.rope_type == "yarn"
    checkpoint = {"state_dict": {f"model.{name}": weight for name, weight in model.state_dict().items()}}
    describe(checkpoint, backbone, None)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    trained = load_trained(tmp_path / "x.ckpt")
    assert trained.backbone.rope_scaling == backbone.rope_scaling
    ids = torch.arange(3, 43)[None]
    assert torch.equal(trained.build()(ids).logits, model(ids).logits)


def test_bad_values(tmp_path):
    with refused("factor", 0.5):
        RopeScaling("yarn", 0.5)
    with refused("original_max_position_embeddings", 0):
        RopeScaling("yarn", 2, 0)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with refused("rope_scaling", "gpt2"):
        _ = Backbone(str(tmp_path), rope_scaling=RopeScaling("yarn", 2)).config
