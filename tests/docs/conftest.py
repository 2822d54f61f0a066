"""Commands of the pages run as a user far from the checkout would run them."""

from cli_helpers import elsewhere
from plugin_helpers import examples

__all__ = ["elsewhere", "examples"]
