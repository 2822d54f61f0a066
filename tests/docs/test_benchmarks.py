"""The benchmarks, which other tests do not run: that they fit the package, and what they compare."""

import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import kvpress_agreement
import pytest

from lrsa_lit.ops.sparse_attention import Rule

# It runs where kvpress is installed and this package is not.
SCRIPTS = sorted(
    path.stem for path in Path(kvpress_agreement.__file__).parent.glob("*.py") if path.stem != "kvpress_peer"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_finds_all_that_it_imports(name):
    # Some set variables and paths for the processes that they start.
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [*sys.path]):
        assert importlib.import_module(name).__doc__


def test_presses_of_kvpress_and_systems_are_compared_at_the_same_budget():
    cases = [case for case in kvpress_agreement.cases([300]) if case.removed]
    assert len(cases) == 2 * 13
    for case in cases:
        inner = case.press["init"].get("press", case.press)
        assert inner["init"]["compression_ratio"] == case.removed
        if not isinstance(case.ours, Rule):
            assert case.ours.kept == pytest.approx(1 - case.removed, abs=1e-12)
