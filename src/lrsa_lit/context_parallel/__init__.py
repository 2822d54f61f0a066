"""Context parallelism: the tokens of a row on several devices, of which each gathers only what the others keep."""

from lrsa_lit.context_parallel.shared_rows import SharedRows
from lrsa_lit.context_parallel.shares import Shares, shortest_row

__all__ = ["SharedRows", "Shares", "shortest_row"]
