"""The rule of the operator: which keys a query sees, and which compressor reduces the old ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lrsa_lit.bounds import check_setting, is_integer, replaced
from lrsa_lit.ops.sparse_attention.compressors import Compressor, LagRelative
from lrsa_lit.ops.sparse_attention.kernel_code import kernel_code
from lrsa_lit.ops.sparse_attention.rotary import Rotary


@dataclass(frozen=True)
class Rule:
    """The rule of lag-relative sparse attention (arXiv 2506.11498, arXiv 2504.04704) for one layer.

    Args:
        sink_size: number of first tokens of a sequence that are never dropped (S >= 0).
        lag_size: tokens in a lag partition (L >= 2).
        top_k: key-value pairs kept of each partition, per KV head (0 <= K <= L).
        chunk_size: tokens between two compressions (C >= 1); None means lag_size.
        compressor: the compressor, which turns a partition into K pairs.
        rotary: the rotation of the keys, for compressors that need it. Enabling LRSA on a model sets it.

    Raises:
        UserError: a value is out of bounds.
    """

    sink_size: int = 16
    lag_size: int = 128
    top_k: int = 32
    chunk_size: int | None = None
    compressor: Compressor = field(default_factory=LagRelative)
    rotary: Rotary | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sinks = is_integer(self.sink_size) and self.sink_size >= 0
        check_setting("sink_size", self.sink_size, sinks, "an integer >= 0")
        lag = is_integer(self.lag_size) and self.lag_size >= 2
        check_setting("lag_size", self.lag_size, lag, "an integer >= 2")
        kept = is_integer(self.top_k) and 0 <= self.top_k <= self.lag_size
        check_setting("top_k", self.top_k, kept, f"an integer from 0 to lag_size ({self.lag_size})")
        chunk = self.chunk_size is None or (is_integer(self.chunk_size) and self.chunk_size >= 1)
        check_setting("chunk_size", self.chunk_size, chunk, "an integer >= 1, or null for lag_size")
        check_setting("compressor", self.compressor, isinstance(self.compressor, Compressor), "a Compressor")
        window = self.compressor.window
        queries = is_integer(window) and 0 <= window <= self.lag_size
        check_setting(
            "compressor.init_args.window", window, queries, f"an integer from 0 to lag_size ({self.lag_size})"
        )
        rotation = self.rotary is None or isinstance(self.rotary, Rotary)
        check_setting("rotary", self.rotary, rotation, "a Rotary, or none")

    @property
    def chunk(self) -> int:
        """C, the tokens between two compressions."""
        return self.lag_size if self.chunk_size is None else self.chunk_size

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """S, L, K, C: the whole rule except its compressor and rotation."""
        return self.sink_size, self.lag_size, self.top_k, self.chunk

    @property
    def first_compression(self) -> int:
        """S + 2L, the first position at which a partition (with its reference) can be compressed."""
        return self.sink_size + 2 * self.lag_size

    def replace(self, **changes: Any) -> Rule:
        """A copy with other values; unknown names raise a UserError."""
        return replaced(self, changes)


KEEP_ALL = Rule(sink_size=0, lag_size=1 << 29, top_k=0)
"""Dense attention as a rule: partitions so long that none is ever full."""


class HasRule(Protocol):
    """An object that can be passed instead of a rule, because it has one."""

    @property
    def rule(self) -> Rule:
        """The rule itself."""


def rule_of(given: Rule | HasRule) -> Rule:
    """The rule itself, whether a rule or an object that has one is given."""
    return given if isinstance(given, Rule) else given.rule


def tensor_of_rule(rule: Rule) -> Tensor | None:
    """S, L, K, C and the selector's ``kernel_code`` as float64 on the CPU; None if the selector has no code."""
    code = kernel_code(rule.compressor, rule.top_k)
    if code is None:
        return None
    values = *rule.numbers, *code
    # An evaluation may change the rule in inference mode, but a training graph refuses tensors that were made there.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device="cpu")
