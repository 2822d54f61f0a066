"""``lrsa ask FILE "question"``: read a text of any length into one cache and answer questions from it."""

from lrsa_lit.cli.ask.command import run

__all__ = ["run"]
