"""``lrsa sweep``: a fit for each point of a grid of settings, each in a process and an MLflow run of its own."""

from lrsa_lit.sweep.command import run

__all__ = ["run"]
