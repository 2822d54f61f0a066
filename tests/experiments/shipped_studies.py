"""The studies that ship, each opened once in a process: their rows take seconds to check."""

import functools
from pathlib import Path

from lrsa_lit.cli.study import open_study

ROOT = Path(__file__).parents[2]
SHIPPED = "configs/experiment/robustness.yaml"
OBJECTIVES = "configs/experiment/objectives.yaml"
CLAIM = "configs/experiment/claim.yaml"
NARROW = "configs/experiment/narrow.yaml"
opened = functools.cache(open_study)
