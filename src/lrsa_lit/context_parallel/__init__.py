"""Context parallelism: several devices share the tokens of a row, and gather only the pairs that each one keeps."""

from lrsa_lit.context_parallel.shared_rows import SharedRows, needs_all_keys
from lrsa_lit.context_parallel.shares import Shares, shortest_row, too_short

__all__ = ["SharedRows", "Shares", "needs_all_keys", "shortest_row", "too_short"]
