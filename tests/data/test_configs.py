import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import lrsa_lit.data
from lrsa_lit.data import QADataModule
from lrsa_lit.data.plan import Stage
from lrsa_lit.data.policies import FixedSize, Packed

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_builds_its_data_set(path: Path):
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(QADataModule, "data")
    # Answers of some data sets are longer than most, and texts have none.
    parser.add_argument("--model.max_new_tokens", type=int)
    parser.add_argument("--model.generate_answers", type=bool)
    parser.add_argument("--best_by", type=str)
    parsed = parser.parse_args(["--config", str(path), "--data.init_args.eval_batch_size=2"])
    data = parser.instantiate_classes(parsed).data
    assert parsed.data.class_path.startswith("lrsa_lit.data.")
    assert (data.eval_batch_size, data.max_tokens) == (2, parsed.data.init_args.max_tokens)
    assert path.read_text().startswith("# lrsa ")


def test_every_data_set_has_a_config():
    named = {line.split(".")[-1] for path in CONFIGS for line in path.read_text().split() if "lrsa_lit.data." in line}
    assert named == set(lrsa_lit.data.__all__) - {"QADataModule"}


def test_how_to_batch_is_yaml(tmp_path: Path):
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(QADataModule, "data")
    (tmp_path / "batches.yaml").write_text(
        "data: {init_args: {packing: {tokens: 8192}, curriculum: [{max_tokens: 2048, until_step: 200}, "
        "{max_tokens: 4096}]}}\n"
    )
    given = ["--config", str(CONFIGS[0].with_name("files.yaml")), "--config", str(tmp_path / "batches.yaml")]
    data = parser.instantiate_classes(parser.parse_args([*given, "--data.init_args.packing.tokens=9000"])).data
    assert data.packing == Packed(9000)
    assert data.curriculum == [Stage(2048, 200), Stage(4096)]
    turned_off = ["--data.init_args.packing=null", "--data.init_args.group_by_length=true"]
    data = parser.instantiate_classes(parser.parse_args([*given, *turned_off])).data
    assert data.policy == FixedSize(1, by_length=True)


def test_the_mixture_of_the_readme_is_one(tmp_path: Path):
    readme = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    block = next(block for block in re.findall("```yaml\n(.*?)```", readme, re.DOTALL) if "Mixture" in block)
    (tmp_path / "mixture.yaml").write_text(block)
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(QADataModule, "data")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "mixture.yaml")])).data
    assert data.policy == Packed(8192)
    assert list(data.data_sets) == ["short", "long", "needle"]
