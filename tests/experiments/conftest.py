"""Each test runs in a folder of its own, with a tiny study at hand."""

import shutil

import pytest
from cli_helpers import elsewhere
from experiments import tiny_study

from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.questions import Questions, splits_of

__all__ = ["elsewhere"]


@pytest.fixture
def study_file(tmp_path):
    return tiny_study.write(tmp_path / "tiny-study.yaml")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The data of the study."""
    folder = tmp_path_factory.mktemp("study")
    study = open_study(str(tiny_study.write(folder / "tiny-study.yaml")))
    Questions(study, folder / "data").prepare(splits_of(study.work(*study.parts)))
    return folder / "data"


@pytest.fixture
def data(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture
def results(tmp_path):
    return shutil.copy(tiny_study.RESULTS, tmp_path / "results.jsonl")
