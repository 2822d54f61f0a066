"""Each test of the command line runs as a user far from the checkout would."""

from cli_helpers import elsewhere
from plugin_helpers import examples

__all__ = ["elsewhere", "examples"]
