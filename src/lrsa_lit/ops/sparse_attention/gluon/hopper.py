"""Which calls go to the kernels for Hopper GPUs: forward, dQ, and dK and dV of the compact buffer.

Everything else runs the plain kernels, to the same accuracy. Gluon is experimental: another version of Triton may
compile the kernels to code that computes something else, or that is slower. So only versions with which they have
passed the tests on a Hopper GPU are let in.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
from torch import Tensor

from lrsa_lit.ops.sparse_attention.triton.host_functions import expressible

__all__ = [
    "CHECKED", "COMPILES_WITH", "DIM", "ENOUGH", "RAN_WITH", "forward_pipeline", "key_gradient_pipeline",
    "query_gradient_pipeline", "refusal", "suits",
]  # fmt: skip

RAN_WITH = ("3.6",)
"""Versions of Triton with which the tests of these kernels have passed on a Hopper GPU: ``make test-gpu``."""

COMPILES_WITH = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton that compile the kernels, by benchmarks/hopper_compile.py; those that pass on a GPU move up."""


def _is_among(versions: tuple[str, ...]) -> bool:
    """Whether the installed Triton is a release of one of some versions."""
    return ".".join(triton.__version__.split(".")[:2]) in versions


CHECKED: bool = _is_among(RAN_WITH)
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
        compiles = _is_among(COMPILES_WITH)
        state = "compiles them, but no GPU has run them with it" if compiles else "is not known to compile them"
        tested = f"the faster kernels for Hopper GPUs have run with triton {' and '.join(RAN_WITH)} alone"
        return f"{tested} (torch 2.11 has 3.6); triton {triton.__version__}, which is installed, {state}"
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
