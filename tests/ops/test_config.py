"""The config: bounds told in one line, frozen, digested, written and read back."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
from helpers import refused

from lrsa_lit.ops.sparse_attention import LRSAConfig, MeanPool, RandomTokens, Recency

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
    assert (config.chunk, config.first_compression) == (128, 16 + 256)
    assert config.dense_layers == ()
    assert config.replace(chunk_size=7).chunk == 7


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


@pytest.mark.parametrize("compressor", [RandomTokens(seed=7), MeanPool(), Recency()], ids=lambda c: type(c).__name__)
def test_a_config_survives_json(compressor):
    config = LRSAConfig(3, 9, 4, 5, 0.25, (1, 2), compressor)
    again = LRSAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest() == config.digest()
    assert LRSAConfig(**config.to_dict()) == config


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
        ({"compressor": "Recency"}, "compressor", "Recency"),
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
        "name-alone",
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


def test_for_layer_leaves_dense_layers_out_and_gives_random_layers_their_own_seed():
    config = LRSAConfig(dense_layers=(1,), compressor=RandomTokens(seed=3))
    assert config.for_layer(1) is None
    assert LRSAConfig().for_layer(0) == LRSAConfig()
    seeds = [config.for_layer(layer).compressor.seed for layer in (0, 2, 3)]
    assert len(set(seeds)) == 3
    other = [config.replace(compressor=RandomTokens(seed=4)).for_layer(layer).compressor.seed for layer in (0, 2, 3)]
    assert not set(seeds) & set(other)
