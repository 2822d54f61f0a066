"""Fine-tune and run LLMs with Lag-Relative Sparse Attention (arXiv 2506.11498) on PyTorch Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrsa_lit.lazy import lazily

if TYPE_CHECKING:
    from lrsa_lit.attention import LRSACache, LRSAConfig, enable, graphed_decoding, prefill
    from lrsa_lit.errors import UserError
    from lrsa_lit.ops.sparse_attention import Rule, sparse_attention

__version__ = "0.2.0"
__all__ = ["LRSACache", "LRSAConfig", "Rule", "UserError", "enable", "graphed_decoding", "prefill", "sparse_attention"]

_OPERATOR = "lrsa_lit.ops.sparse_attention"
__getattr__ = lazily(
    __name__,
    dict.fromkeys(__all__, "lrsa_lit.attention")
    | {"Rule": _OPERATOR, "sparse_attention": _OPERATOR, "UserError": "lrsa_lit.errors"},
)
