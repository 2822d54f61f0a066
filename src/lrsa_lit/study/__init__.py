"""A study: rows of fits, each evaluated under several attentions on several data sets, in parts that resume.

It runs where the command line's parser, MLflow and the libraries that read data sets are missing: from token files that
``lrsa study data`` has written elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """Run ``lrsa study``; see :mod:`lrsa_lit.study.command`."""
    from lrsa_lit.study.command import run as run_command

    run_command(arguments)
