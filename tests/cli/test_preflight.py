"""What is checked before a run's parts are built."""

import sys
import types

import pytest
from helpers import refused

from lrsa_lit.cli.preflight import check_strategy
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
