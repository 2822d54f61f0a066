"""Context parallelism: the tokens of a row on several devices, of which each gathers only what the others keep."""

from lrsa_lit.context_parallel.shared_rows import SharedRows, needs_all_keys
from lrsa_lit.context_parallel.shares import Shares, shortest_row, too_short

__all__ = ["SharedRows", "Shares", "needs_all_keys", "shortest_row", "too_short"]
