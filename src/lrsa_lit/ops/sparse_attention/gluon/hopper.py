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

__all__ = ["CHECKED", "DIM", "ENOUGH", "forward_pipeline", "key_gradient_pipeline", "query_gradient_pipeline", "suits"]

CHECKED: bool = triton.__version__.startswith("3.6.")
"""Whether the kernels were run with this version of Triton."""

_log = logging.getLogger(__name__)

if CHECKED:
    from lrsa_lit.ops.sparse_attention.gluon import forward_pipeline, key_gradient_pipeline, query_gradient_pipeline

DIM = 128
"""The head size that the kernels are faster for; at 64 the plain ones are."""

ENOUGH = 1 << 18
"""Rows of queries of all heads below which the plain kernels are faster: a program here lives for many tiles."""


def suits(query: Tensor, *sources: Tensor) -> bool:
    """Whether a call goes to these kernels; ``sources`` are all tensors beside the query that are loaded in blocks.

    That takes a Hopper device, a Triton that they were run with, 16 bits, a head size and a number of rows that they
    are faster for, and tensors that the copy engine can express; compact buffers may be empty. If only Triton is in the
    way, the log says so once.
    """
    if query.shape[3] != DIM or query.numel() < ENOUGH * DIM or not _is_hopper(query.device):
        return False
    fits = query.dtype in (torch.bfloat16, torch.float16)
    if not fits or not all(expressible(tensor) or not tensor.numel() for tensor in (query, *sources)):
        return False
    if not CHECKED:
        _say_what_is_missing()
    return CHECKED


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.lru_cache
def _say_what_is_missing() -> None:
    """Cached, so that it is logged once."""
    _log.warning(
        "sparse_attention runs its plain Triton kernels: the faster ones for Hopper GPUs need triton 3.6, which comes "
        "with torch 2.11; triton %s is installed",
        triton.__version__,
    )
