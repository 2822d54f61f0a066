"""Which calls go to the kernels for Hopper GPUs: forward, dQ, and dK and dV of the compact buffer.

Everything else runs the plain kernels, to the same accuracy. Gluon is experimental, and so only versions of Triton that
the kernels were run with are let in.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton.host_functions import expressible

__all__ = [
    "CHECKED", "DIM", "ENOUGH", "forward_pipeline", "key_gradient_pipeline", "query_gradient_pipeline", "refusal",
    "suits",
]  # fmt: skip

CHECKED: bool = triton.__version__.startswith("3.6.")
"""Whether the kernels were run with this version of Triton."""

_DTYPES = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)

if CHECKED:
    from lrsa_lit.ops.sparse_attention.gluon import forward_pipeline, key_gradient_pipeline, query_gradient_pipeline

DIM = 128
"""The head size that the kernels are faster for; at 64 the plain ones are."""

ENOUGH = 1 << 18
"""Rows of queries of all heads below which the plain kernels are faster: a program here lives for many tiles."""


def suits(query: Tensor, *sources: Tensor) -> bool:
    """Whether a call goes to these kernels; ``sources`` are all tensors beside the query that are loaded in blocks.

    That takes what :func:`refusal` looks at, a number of rows that they are faster for, and tensors that the copy
    engine can express; compact buffers may be empty. Where enough rows of a Hopper GPU run the plain kernels, the log
    says once why.
    """
    rows = query.numel() // query.shape[3]
    if rows < ENOUGH or not _is_hopper(query.device):
        return False
    if not all(expressible(tensor) or not tensor.numel() for tensor in (query, *sources)):
        return False
    return _let_in(query.device, query.dtype, query.shape[3], CHECKED)


def refusal(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why calls of such tensors run the plain kernels, however many rows they have; None if these kernels run."""
    if not _is_hopper(device):
        return "the faster kernels are for Hopper GPUs (compute capability 9.0)"
    if dim != DIM:
        return f"the faster kernels for Hopper GPUs are for a head size of {DIM}; this one is {dim}"
    if dtype not in _DTYPES:
        return (
            f"the faster kernels for Hopper GPUs are for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        )
    if not CHECKED:
        needed = "the faster kernels for Hopper GPUs need triton 3.6, which comes with torch 2.11"
        return f"{needed}; triton {triton.__version__} is installed"
    return None


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.lru_cache
def _let_in(device: torch.device, dtype: torch.dtype, dim: int, checked: bool) -> bool:
    """Cached, so that a refusal is logged once; what another Triton would mend is a warning."""
    reason = refusal(device, dtype, dim)
    if reason is not None:
        mendable = dim == DIM and dtype in _DTYPES
        _log.log(
            logging.WARNING if mendable else logging.INFO,
            "sparse_attention runs its plain Triton kernels: %s",
            reason,
        )
    return reason is None
