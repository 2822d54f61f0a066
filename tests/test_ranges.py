"""Versions: both ends of what pyproject.toml admits are pinned, and an environment made for an end has that end."""

import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
END = os.environ.get("LRSA_RANGE")
"""Set by `make test-ranges`: the environment that the tests run in, "oldest" or "newest"."""

ELSEWHERE = {"torch"}
"""The CPU build that constraints.txt names is the only one the tests run with; the GPU tests run with older ones."""


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    return {canonicalize_name(each.name): each for each in found}


def pinned(end):
    lines = (ROOT / "constraints" / f"{end}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def lower_bound(requirement):
    (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return bound


@pytest.mark.parametrize("name", sorted(requirements()))
def test_the_oldest_environment_holds_the_lower_bound(name):
    if name not in ELSEWHERE:
        assert requirements()[name].specifier.contains(pinned("oldest")[name])
        wanted = [int(part) for part in lower_bound(requirements()[name]).split(".")]
        assert [int(part) for part in pinned("oldest")[name].split(".")][: len(wanted)] == wanted


@pytest.mark.parametrize("name", sorted(requirements()))
def test_the_newest_environment_is_within_the_range(name):
    assert requirements()[name].specifier.contains(pinned("newest")[name])


@pytest.mark.skipif(END is None, reason="not in an environment of `make test-ranges`")
def test_this_environment_has_the_pinned_versions():
    versions = {name: metadata.version(name).partition("+")[0] for name in requirements()}
    assert versions == {name: pinned(END)[name] for name in requirements()}


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_what_is_reached_by_private_names_has_an_upper_bound(name):
    operators = {each.operator for each in requirements()[name].specifier}
    assert operators & {"<", "<="}


def test_make_names_paths_that_exist():
    """pytest collects nothing at all when one of the paths it is given is missing."""
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "test-ranges", "test-gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = set(re.findall(r"(?<![\w./-])tests/[\w./-]+", printed.stdout))
    assert len(paths) > 10
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
