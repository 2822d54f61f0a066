"""What is checked before a run's parts are built."""

import sys
import types

import pytest
from cli_helpers import DEBUG, refusal
from helpers import refused
from transformers import MistralConfig

from lrsa_lit.cli.preflight import check_strategy
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.strategies import FullySharded

OWN = {"class_path": "own_strategies.Mine"}


@pytest.fixture(autouse=True)
def own_strategies(monkeypatch):
    module = types.ModuleType("own_strategies")
    module.Mine = type("Mine", (FullySharded,), {})
    monkeypatch.setitem(sys.modules, "own_strategies", module)


@pytest.fixture
def shards(tmp_path):
    for name in (".metadata", "meta.pt"):
        (tmp_path / name).touch()
    return str(tmp_path)


def test_what_a_strategy_can_do_is_asked_of_its_class_whatever_its_name(shards):
    for setting in (OWN, "own_strategies.Mine"):
        check_strategy("fit", setting, shards)
        with refused("trainer.strategy", "Mine"):
            check_strategy("predict", setting, None)


@pytest.mark.parametrize("setting", [None, "ddp", {"class_path": "lightning.pytorch.strategies.DDPStrategy"}])
def test_others_predict_and_read_no_shards(setting, shards):
    check_strategy("predict", setting, None)
    with refused("ckpt_path", shards):
        check_strategy("fit", setting, shards)


def test_what_is_no_strategy_is_refused():
    with refused("trainer.strategy.class_path", "collections.OrderedDict"):
        check_strategy("fit", "collections.OrderedDict", None)


def test_a_model_with_windows_is_refused_before_its_weights_are_read(tmp_path, capfd):
    folder = tmp_path / "model"
    MistralConfig(num_hidden_layers=2, vocab_size=259, sliding_window=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    line = refusal(capfd, "fit", *DEBUG, "--model.backbone.source", str(folder))
    assert line.startswith("model: 'mistral' uses sliding-window or linear layers")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder]
