from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

import lrsa_lit.data
from lrsa_lit.data import QADataModule

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_builds_its_data_set(path: Path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(QADataModule, "data")
    parsed = parser.parse_args(["--config", str(path), "--data.init_args.batch_size=2"])
    data = parser.instantiate_classes(parsed).data
    assert parsed.data.class_path.startswith("lrsa_lit.data.")
    assert (data.batch_size, data.max_tokens) == (2, parsed.data.init_args.max_tokens)
    assert path.read_text().startswith("# lrsa ")


def test_every_data_set_has_a_config():
    named = {line.split(".")[-1] for path in CONFIGS for line in path.read_text().split() if "lrsa_lit.data." in line}
    assert named == set(lrsa_lit.data.__all__) - {"QADataModule"}
