"""The rule's arithmetic in one place, for integers, for tensors of integers, and for Triton, which compiles it.

Python's division rounds down and Triton's towards zero, so no dividend here is ever negative.

Symbols as in README.md: S sink, L lag, C chunk.
"""

from __future__ import annotations


def partitions_at(position, sink, lag, chunk):
    """P(t), the number of compressed partitions when the token at ``position`` attends; 0 for a negative position."""
    first = sink + 2 * lag
    past = position - first
    # b(t), the start of the chunk in which the token is processed.
    start = first + (past >= 0) * past // chunk * chunk
    return (position >= first) * ((start - sink) // lag - 1)


def first_position(partitions, sink, lag, chunk):
    """The first position at which ``partitions`` >= 1 are compressed."""
    return sink + 2 * lag + ((partitions - 1) * lag + chunk - 1) // chunk * chunk


def sinks_and(partitions, sink, size):
    """Tokens in the sinks and in ``partitions`` of ``size`` tokens each; 0 if no partition is compressed."""
    return (partitions > 0) * (sink + partitions * size)
