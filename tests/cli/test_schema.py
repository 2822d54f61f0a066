"""The JSON schema: shipped files fulfil it, mistakes do not, and the grouped help has the same settings."""

import functools
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from lrsa_lit import plugins
from lrsa_lit.cli import catalogue
from lrsa_lit.cli.main import main
from lrsa_lit.cli.schema import FILE, settings_schema

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "cli.yaml", *sorted((ROOT / "configs").rglob("*.yaml"))]
WITH_SCHEMA = [path for path in SHIPPED if catalogue.MODELINE in path.read_text(encoding="utf-8")]
STUDIES = [path for path in SHIPPED if path.read_text(encoding="utf-8").startswith("# lrsa study ")]
# Settings of another task, which are others.
OF_A_TASK = [ROOT / "configs" / "experiment" / "cpc.yaml", ROOT / "configs" / "task" / "sentence_retrieval.yaml"]
made = functools.cache(settings_schema)


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch):
    """The schema is made once, and must not have classes of other tests."""
    monkeypatch.setattr(plugins, "_added", {kind: {} for kind in plugins.KINDS})


@functools.cache
def validator():
    return jsonschema.Draft202012Validator(json.loads((ROOT / FILE).read_text(encoding="utf-8")))


def without_words(schema):
    """A schema without its descriptions, which change with docstrings."""
    if isinstance(schema, list):
        return [without_words(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: without_words(each) for key, each in schema.items() if key != "description" or isinstance(each, dict)}


def test_the_shipped_schema_is_that_of_the_parser():
    shipped = json.loads((ROOT / FILE).read_text(encoding="utf-8"))
    assert without_words(shipped) == without_words(json.loads(json.dumps(made()))), "make schema writes it"
    jsonschema.Draft202012Validator.check_schema(shipped)


def test_each_shipped_file_names_the_schema():
    assert {*WITH_SCHEMA, *STUDIES, *OF_A_TASK} == set(SHIPPED)
    for path in WITH_SCHEMA:
        (line,) = [line for line in path.read_text().splitlines() if line.startswith(catalogue.MODELINE)]
        assert (path.parent / line.removeprefix(catalogue.MODELINE)).resolve() == ROOT / FILE


@pytest.mark.parametrize("path", WITH_SCHEMA, ids=lambda path: path.name)
def test_a_shipped_file_fulfils_the_schema(path):
    assert list(validator().iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "model: {lrsa: {top_k: '${model.lrsa.lag_size}'}}",
        "model: {lrsa: {compressor: Recency}}",
        "model: {lrsa: {compressor: {class_path: my.Own, init_args: {x: 1}}}}",
        "data: {class_path: QAFiles, init_args: {train: a.jsonl}}",
        "data: {init_args: {max_tokens: 512}}",
        "trainer: {max_steps: 5, devices: 2, logger: false}",
        "plugins: [mine]\nbudget: 0.25",
    ],
)
def test_settings_fulfil_the_schema(text):
    assert list(validator().iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        "modl: {}",
        "model: {lrsa: {lag: 3}}",
        "model: {lrsa: {top_k: many}}",
        "trainer: {max_step: 5}",
        "data: {init_args: {max_token: 512}}",
        "data: {class_path: lrsa_lit.data.QAFiles, init_args: {tran: a.jsonl}}",
        "validate_first: sometimes",
    ],
)
def test_mistakes_do_not(text):
    assert list(validator().iter_errors(yaml.safe_load(text)))


def properties_at(key):
    node = made()
    for name in key.split("."):
        node = node["properties"][name]
        if "$ref" in json.dumps(node) and "properties" not in node:
            (name,) = [each["$ref"].rpartition("/")[2] for each in node.get("anyOf", [node]) if "$ref" in each]
            node = made()["$defs"][name]
    return node["properties"].keys()


@pytest.mark.parametrize("part", catalogue.parts())
def test_the_grouped_help_has_the_settings_of_each_part(part):
    assert properties_at(part) - {"callbacks+"} == catalogue.keys(str(catalogue.part_of(part))).keys()


@pytest.mark.parametrize("kind", catalogue.SLOTS.values())
def test_the_grouped_help_has_the_settings_of_each_class(kind):
    base = "Callback" if kind == "callbacks" else plugins.KINDS[kind].base
    shapes = {}
    for shape in made()["$defs"][base]["anyOf"]:
        if names := shape.get("properties", {}).get("class_path", {}).get("enum"):
            shapes[names[1]] = shape["properties"]["init_args"]["properties"].keys()
    assert shapes == {path: catalogue.keys(path).keys() - {"tokenizer"} for path in catalogue.named(kind).values()}


@pytest.mark.parametrize("path", [path for paths in catalogue.OTHERS.values() for path in paths])
def test_other_classes_have_the_settings_that_their_source_has(path):
    shapes = [shape for each in made()["$defs"].values() for shape in each.get("anyOf", ()) if isinstance(shape, dict)]
    (found,) = {
        tuple(shape["properties"]["init_args"]["properties"])
        for shape in shapes
        if path in shape.get("properties", {}).get("class_path", {}).get("enum", ())
    }
    assert set(found) == catalogue.keys(path).keys()


def test_a_class_of_ones_own_is_in_the_printed_schema(examples, capsys):
    main(["schema", "--plugins", "key_norm"])
    printed = json.loads(capsys.readouterr().out)
    assert "key_norm.KeyNorm" in json.dumps(printed["$defs"]["Compressor"])
