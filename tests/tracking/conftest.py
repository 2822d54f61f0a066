"""Each test of tracking runs as a user far from the checkout would."""

from cli_helpers import elsewhere

__all__ = ["elsewhere"]
