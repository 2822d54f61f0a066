"""A text to ask about, and the command."""

import io
import sys

import pytest
from ask_helpers import (
    ASK,
    TEXT,
)

from lrsa_lit.cli.main import main


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    # No terminal, even where pytest runs in one: a test must not wait for a question.
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    (tmp_path / "text.txt").write_text(f"\n{TEXT}\n", encoding="utf-8")


@pytest.fixture
def ask(capfd):
    """Run the command; returns what it wrote to stdout and stderr."""

    def run(*arguments):
        main([*ASK, *arguments])
        return capfd.readouterr()

    return run
