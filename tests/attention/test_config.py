"""The config: bounds told in one line, frozen, digested, written and read back."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
from helpers import refused

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.ops import sparse_attention
from lrsa_lit.ops.sparse_attention import ChunkWise, LagRelative, RandomTokens, Recency, Rule
from lrsa_lit.systems import KeyNorm

BAD = [
    ("sink_size", -1, "an integer >= 0"),
    ("sink_size", 1.0, "an integer >= 0"),
    ("sink_size", True, "an integer >= 0"),
    ("lag_size", 1, "an integer >= 2"),
    ("lag_size", "128", "an integer >= 2"),
    ("top_k", -1, "an integer from 0 to lag_size (128)"),
    ("top_k", 129, "an integer from 0 to lag_size (128)"),
    ("top_k", 0.25, "an integer from 0 to lag_size (128)"),
    ("chunk_size", 0, "an integer >= 1"),
    ("chunk_size", 1.5, "an integer >= 1"),
    ("value_weight", -0.1, "a finite number >= 0"),
    ("value_weight", float("nan"), "a finite number >= 0"),
    ("value_weight", float("inf"), "a finite number >= 0"),
    ("value_weight", "1", "a finite number >= 0"),
    ("dense_layers", (-1,), "layer indices >= 0"),
    ("dense_layers", (1, 1), "different layer indices"),
    ("dense_layers", (0.5,), "layer indices"),
    ("dense_layers", "01", "layer indices"),
    ("dense_layers", 3, "layer indices"),
    ("compressor", "recency", "a Compressor"),
    ("compressor", Recency, "a Compressor"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD, ids=[f"{key}={value}" for key, value, _ in BAD])
def test_a_value_out_of_bounds_is_told_with_its_key_and_what_is_allowed(key, value, allowed):
    with refused(key, value, allowed):
        LRSAConfig(**{key: value})


@pytest.mark.parametrize(
    "values",
    [
        {"sink_size": 0},
        {"lag_size": 2, "top_k": 2},
        {"top_k": 0},
        {"top_k": 128},
        {"chunk_size": 1},
        {"chunk_size": 1000},
        {"value_weight": 0},
        {"dense_layers": [3, 0]},
    ],
    ids=str,
)
def test_the_bounds_themselves_are_allowed(values):
    config = LRSAConfig(**values)
    for key, value in values.items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)


def test_the_defaults_are_the_published_ones():
    config = LRSAConfig()
    assert (config.sink_size, config.lag_size, config.top_k, config.value_weight) == (16, 128, 32, 1.0)
    assert (config.rule.chunk, config.rule.first_compression) == (128, 16 + 256)
    assert config.dense_layers == ()
    assert config.replace(chunk_size=7).rule.chunk == 7


def test_a_config_is_frozen_and_hashable():
    config = LRSAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    assert {config: 1}[LRSAConfig()] == 1


CHANGES = [
    {"sink_size": 4},
    {"lag_size": 256},
    {"top_k": 16},
    {"chunk_size": 64},
    {"value_weight": 0.5},
    {"dense_layers": (0,)},
    {"compressor": Recency()},
    {"compressor": RandomTokens()},
    {"compressor": RandomTokens(seed=1)},
    {"system": KeyNorm()},
    {"system": KeyNorm(0.25)},
    {"head_top_k": (32, (0, 1))},
    {"head_top_k": (32, (0, 2))},
    {"latents": True},
]


def test_the_digest_changes_with_each_field_and_with_nothing_else():
    digests = [LRSAConfig().replace(**change).digest() for change in CHANGES]
    assert len({LRSAConfig().digest(), *digests}) == len(CHANGES) + 1
    assert LRSAConfig().digest() == LRSAConfig(dense_layers=[]).digest() == LRSAConfig(value_weight=1).digest()
    assert all(len(digest) == 12 for digest in digests)


def test_every_field_takes_part_in_the_digest_test():
    assert {name for change in CHANGES for name in change} == {item.name for item in dataclasses.fields(LRSAConfig)}


def test_replace_changes_a_copy_and_checks_it():
    config = LRSAConfig()
    assert config.replace(top_k=5).top_k == 5
    assert config.top_k == 32
    with refused("top_k", 999):
        config.replace(top_k=999)
    with refused("topk") as caught:
        config.replace(topk=5)
    assert "top_k" in caught.value.reason


def test_a_dict_with_few_settings_takes_the_defaults_and_is_left_alone():
    values = {"top_k": 3, "compressor": Recency().to_dict()}
    assert LRSAConfig.from_dict(values) == LRSAConfig(top_k=3, compressor=Recency())
    assert values == {"top_k": 3, "compressor": Recency().to_dict()}


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        ({"lag": 3}, "lag", None),
        ({"compressor": {"class_path": "os.system"}}, "compressor", "os.system"),
        ({"compressor": {}}, "compressor", None),
        ({"compressor": {"class_path": f"{Recency.__module__}.Selector"}}, "compressor", ...),
        ({"compressor": {"class_path": ["Recency"]}}, "compressor", ["Recency"]),
        ({"compressor": Recency().to_dict() | {"init_args": {"seeds": 1}}}, "compressor", ...),
        ({"compressor": None}, "compressor", None),
        ({3: 4}, "values", {3: 4}),
        ([["top_k", 3]], "values", [["top_k", 3]]),
        ({"compressor": "recency"}, "compressor", "recency"),
    ],
    ids=[
        "unknown-setting",
        "unknown-class",
        "no-class",
        "abstract-class",
        "several-classes",
        "unknown-argument",
        "null",
        "number-as-setting",
        "list",
        "unknown-name",
    ],
)
def test_a_dict_that_names_something_unknown_is_refused(values, field, value):
    with refused(field, value):
        LRSAConfig.from_dict(values)


@dataclass(frozen=True)
class Local(Recency):
    """A compressor defined outside the package."""


def test_an_imported_compressor_of_another_module_is_found():
    config = LRSAConfig(compressor=Local())
    assert type(LRSAConfig.from_dict(config.to_dict()).compressor) is Local


def test_dense_layers_have_no_rule_and_random_layers_their_own_seed():
    config = LRSAConfig(dense_layers=(1,), compressor=RandomTokens(seed=3))
    assert config.layers.of(1) is None
    assert LRSAConfig().layers.of(0) == LRSAConfig().rule
    seeds = [config.layers.of(layer).compressor.seed for layer in (0, 2, 3)]
    assert len(set(seeds)) == 3
    other = [config.replace(compressor=RandomTokens(seed=4)).layers.of(layer).compressor.seed for layer in (0, 2, 3)]
    assert not set(seeds) & set(other)


def test_a_dense_layer_that_the_model_lacks_is_refused():
    LRSAConfig(dense_layers=(0, 2)).layers.check(3)
    with refused("dense_layers", [2]):
        LRSAConfig(dense_layers=(0, 2)).layers.check(2)


OWN = "lrsa_lit.ops.sparse_attention.compressors."
RECORDED = [
    ("afc75cbc4148", {}, "LagRelative", {}),
    ("e11d9a855159", {"lag_size": 512, "top_k": 256}, "LagRelative", {}),
    ("dc1e27b3c7b5", {"value_weight": 0.5}, "LagRelative", {}),
    ("880044128fd1", {"value_weight": 0, "dense_layers": [3, 0], "chunk_size": 64}, "LagRelative", {}),
    ("cbee1365bbf2", {"value_weight": 2}, "LagRelative", {}),
    ("bae0135f82c4", {}, "ValueRelative", {}),
    ("8d6a5a8d3c35", {"value_weight": 0.25}, "ValueRelative", {}),
    ("de41589b7fc7", {}, "ChunkWise", {"size": 16, "values_only": False}),
    ("b74aa0dad925", {}, "ChunkWise", {"size": 4, "values_only": True}),
    ("9a1a72487f59", {"value_weight": 0.5}, "ChunkWise", {"size": 4, "values_only": False}),
    ("594757064ff6", {}, "RandomTokens", {"seed": 0}),
    ("04943c2ad1d2", {}, "RandomTokens", {"seed": 7}),
    ("b606b5dd39d1", {"value_weight": 3}, "Recency", {}),
    ("c668e36f0d3a", {}, "Strided", {}),
    (
        "5dcb3c43d5f1",
        {"sink_size": 3, "lag_size": 9, "top_k": 4, "chunk_size": 5, "dense_layers": [1, 2], "value_weight": 0.25},
        "MeanPool",
        {},
    ),
]


@pytest.mark.parametrize(("digest", "values", "name", "arguments"), RECORDED, ids=[line[0] for line in RECORDED])
def test_dicts_and_digests_are_those_of_files_that_were_written_before(digest, values, name, arguments):
    compressor = getattr(sparse_attention, name)(**arguments)
    config = LRSAConfig(**values, compressor=compressor)
    assert config.digest() == digest
    written = {
        "sink_size": 16,
        "lag_size": 128,
        "top_k": 32,
        "chunk_size": None,
        "value_weight": 1.0,
        "dense_layers": [],
        "compressor": {"class_path": OWN + name, "init_args": arguments},
    }
    written |= values | {"value_weight": float(values.get("value_weight", 1))}
    assert json.dumps(config.to_dict()) == json.dumps(written)
    assert LRSAConfig.from_dict(written) == LRSAConfig(**written) == config


@pytest.mark.parametrize("kind", [LagRelative, ChunkWise])
def test_a_weight_is_the_same_wherever_it_is_set(kind):
    inside, beside = LRSAConfig(compressor=kind(value_weight=0.5)), LRSAConfig(value_weight=0.5, compressor=kind())
    assert inside == beside
    assert inside.digest() == beside.digest()
    assert inside.value_weight == inside.rule.compressor.value_weight == 0.5
    assert inside.replace(value_weight=1).rule.compressor.value_weight == 1
    with refused("value_weight", 2.0):
        LRSAConfig(value_weight=2, compressor=kind(value_weight=0.5))


def test_a_rule_has_nothing_of_the_model():
    config = LRSAConfig(3, 9, 4, 5, 0.25, (1, 2))
    assert config.rule == Rule(3, 9, 4, 5, LagRelative(value_weight=0.25))
    assert config.rule.replace(top_k=9) == config.replace(top_k=9, dense_layers=()).rule
    with refused("dense_layers"):
        config.rule.replace(dense_layers=())
