"""Settings of a rule beside a system, which does not read them."""

import dataclasses

import pytest
from helpers import refused

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.attention.unread import OF_RULE, check_layers, check_read
from lrsa_lit.systems import KeyNorm

SYSTEM = {"class_path": "lrsa_lit.systems.KeyNorm", "init_args": {"kept": 0.5}}


def run(lrsa=None, **others):
    return {"model": ({} if lrsa is None else {"lrsa": lrsa}) | others}


def test_each_setting_is_read_by_a_rule_or_by_both():
    fields = {field.name for field in dataclasses.fields(LRSAConfig)}
    assert fields == {*OF_RULE, "system", "dense_layers", "head_top_k", "latents"}


@pytest.mark.parametrize(
    ("changes", "system", "field"),
    [
        ({"system": SYSTEM, "compressor": {"class_path": "a.KeyDiff"}}, None, "compressor"),
        ({"system": "KeyNorm", "chunk_size": 4}, None, "chunk_size"),
        ({"top_k": 3}, KeyNorm(), "top_k"),
        ({"dense_layers": [1], "value_weight": 0}, SYSTEM, "value_weight"),
        # All of a rule, written over a system by somebody who does not know of it.
        (LRSAConfig().to_dict(), KeyNorm(), "sink_size"),
    ],
)
def test_what_no_system_reads_is_refused(changes, system, field):
    with refused(field, ..., reason="is not read by the system KeyNorm"):
        check_read(changes, system)


@pytest.mark.parametrize(
    ("changes", "system"),
    [
        ({"system": SYSTEM, "dense_layers": [0]}, None),
        ({"system": None, "top_k": 3}, KeyNorm()),
        ({"top_k": 3}, None),
        ({"chunk_size": None}, KeyNorm()),
        (LRSAConfig(system=KeyNorm(), lag_size=64).to_dict(), None),
        ({"system": None} | LRSAConfig(lag_size=64).to_dict(), KeyNorm()),
    ],
)
def test_what_is_read_is_let_pass(changes, system):
    check_read(changes, system)


def test_settings_below_a_system_are_overridden_and_those_on_top_are_not_read():
    check_layers([run({"lag_size": 64}), run(), run({"system": SYSTEM}), {"model": None}, {}])
    check_layers([run({"system": SYSTEM}), run({"system": None}), run({"lag_size": 64})])
    for layers in ([run({"system": SYSTEM}), run({"lag_size": 64})], [run({"lag_size": 64, "system": SYSTEM})]):
        with refused("model.lrsa.lag_size", 64):
            check_layers(layers)
        check_layers([*layers, run(evaluate={"rule": {"system": None}})])
        check_layers([*layers, run(train_attention={"system": None})])
        with refused("model.lrsa.lag_size", 64):
            check_layers([*layers, run(evaluate={"dense": None, "all": {"dense_layers": [0]}})])
