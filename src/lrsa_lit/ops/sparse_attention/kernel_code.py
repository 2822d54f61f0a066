"""The selectors that the fused kernels know, as numbers: compiled layers hand over a tensor, not an object."""

from __future__ import annotations

from lrsa_lit.ops.sparse_attention.compressors import Compressor, KeyDiff, SpreadSelector

KEY_DIFF = -1.0


def kernel_code(compressor: Compressor) -> tuple[float, float] | None:
    """Weights of the key and the value score; or a negative family, and 0; None of what selects in PyTorch.

    A subclass of :class:`KeyDiff` may score otherwise, so it has no code.
    """
    if isinstance(compressor, SpreadSelector):
        return compressor.weights
    return (KEY_DIFF, 0.0) if type(compressor) is KeyDiff else None
