"""Decide which calls use the kernels for Hopper GPUs: forward, dQ, and dK and dV of the compact buffer.

Everything else uses the plain kernels, with the same accuracy. Gluon is experimental: with another version of Triton,
the kernels could compute something else, or be slower. So they are used only with versions with which they have passed
the tests on a Hopper GPU.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton.host_functions import expressible, triton_is_among

__all__ = [
    "CHECKED", "COMPILES_WITH", "DIM", "ENOUGH", "RAN_WITH", "forward_pipeline", "key_gradient_pipeline",
    "query_gradient_pipeline", "refusal", "suits",
]  # fmt: skip

RAN_WITH = ("3.6", "3.9")
"""Versions of Triton with which these kernels have passed their tests on a Hopper GPU (``make test-gpu``)."""

COMPILES_WITH = ("3.6", "3.7", "3.8", "3.9")
"""Versions that compile the kernels (benchmarks/hopper_compile.py). After passing on a GPU, add them to RAN_WITH."""


CHECKED: bool = triton_is_among(RAN_WITH)
"""Whether the kernels were tested with the installed version of Triton."""

_DTYPES = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)

if CHECKED:
    from lrsa_lit.ops.sparse_attention.gluon import forward_pipeline, key_gradient_pipeline, query_gradient_pipeline

DIM = 128
"""The head size for which these kernels are faster; at 64 the plain ones are."""

ENOUGH = 1 << 18
"""With fewer rows of queries of all heads, the plain kernels are faster: a program here needs many tiles to pay off."""


def suits(query: Tensor, *sources: Tensor) -> bool:
    """Whether a call uses these kernels; ``sources`` are all tensors besides the query that are loaded in blocks.

    The conditions are those of :func:`refusal`, enough rows, and tensor layouts that TMA supports; compact buffers may
    be empty. If :func:`refusal` is why a large call on a Hopper GPU uses the plain kernels, it is logged once.
    """
    rows = query.numel() // query.shape[3]
    if rows < ENOUGH or not _is_hopper(query.device):
        return False
    if not all(expressible(tensor) or not tensor.numel() for tensor in (query, *sources)):
        return False
    return _let_in(query.device, query.dtype, query.shape[3], CHECKED)


def refusal(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why tensors of this kind always use the plain kernels; None if these kernels can run."""
    if not _is_hopper(device):
        return "the faster kernels are for Hopper GPUs (compute capability 9.0)"
    if dim != DIM:
        return f"the faster kernels for Hopper GPUs are for a head size of {DIM}; this one is {dim}"
    if dtype not in _DTYPES:
        return (
            f"the faster kernels for Hopper GPUs are for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        )
    if not CHECKED:
        compiles = triton_is_among(COMPILES_WITH)
        state = "compiles them, but no GPU has run them with it" if compiles else "is not known to compile them"
        tested = f"the faster kernels for Hopper GPUs have run with triton {' and '.join(RAN_WITH)} alone"
        return f"{tested} (torch 2.11 has 3.6); triton {triton.__version__}, which is installed, {state}"
    return None


@functools.lru_cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.lru_cache
def _let_in(device: torch.device, dtype: torch.dtype, dim: int, checked: bool) -> bool:
    """Cached, so that a refusal is logged once; it is a warning if another version of Triton would help."""
    reason = refusal(device, dtype, dim)
    if reason is not None:
        mendable = dim == DIM and dtype in _DTYPES
        _log.log(
            logging.WARNING if mendable else logging.INFO,
            "sparse_attention uses its plain Triton kernels: %s",
            reason,
        )
    return reason is None
