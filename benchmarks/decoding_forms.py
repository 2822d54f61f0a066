"""Ways to attend to a static cache with one new token per row, all of whose rows are read: no mask, no lengths.

Dimensions: B rows of the batch, H key-value heads, Hq query heads, T tokens in the cache, D head_dim. Caches are made
by :func:`draw_cache`: (B, capacity, H, D) in memory, passed as views (B, H, T, D).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from records import MissingError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lrsa_lit.ops.sparse_attention.api import implementation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (B, Hq, 1, D), keys and values (B, H, T, D) to the output (B, Hq, 1, D), with scale D ** -0.5."""
_PAGE = 16


def grouped_truth(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention in float64."""
    group = query.shape[1] // key.shape[1]
    exact = [query.double(), *(part.double().repeat_interleave(group, dim=1) for part in (key, value))]
    weights = (exact[0] @ exact[1].mT * query.shape[-1] ** -0.5).softmax(dim=-1)
    return weights @ exact[2]


def draw_cache(batch: int, heads: int, rows: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Random keys and values (B, H, T, D), in memory for whole pages."""
    shape = batch, -(-rows // _PAGE) * _PAGE, heads, dim
    key, value = (torch.randn(shape, device=like.device, dtype=like.dtype)[:, :rows].transpose(1, 2) for _ in range(2))
    return key, value


def _sdpa(backend: SDPBackend, folded: bool, device: str) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend) if device == "cuda" else contextlib.nullcontext():
            if not folded:
                return scaled_dot_product_attention(query, key, value, enable_gqa=True)
            rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
            return scaled_dot_product_attention(rows, key, value).flatten(1, 2)[:, :, None]

    return attend


def _decoder(device: str) -> Attend:
    """The kernel of LRSA's decoder."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = _length(key.shape[2], key.device)
        output: Tensor = implementation("auto", query).attend_one(query, key, value, length, query.shape[-1] ** -0.5)
        return output

    return attend


@functools.cache
def _length(rows: int, device: torch.device) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32, device=device)


def _flashinfer(device: str) -> Attend:
    """Batch decoding over pages of the cache, planned by the first call, which is not captured."""
    if device != "cuda" or importlib.util.find_spec("flashinfer") is None:
        raise MissingError("needs flashinfer-python and a CUDA device")
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

    planned: list[Any] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, dim = key.shape
        of_row = key.stride(0) // (_PAGE * heads * dim)
        if not planned:
            numbers: dict[str, Any] = {"dtype": torch.int32, "device": key.device}
            pages = -(-rows // _PAGE)
            bounds = torch.arange(batch + 1, **numbers) * pages
            indices = (torch.arange(batch, **numbers)[:, None] * of_row + torch.arange(pages, **numbers)).flatten()
            last = torch.full((batch,), rows - (pages - 1) * _PAGE, **numbers)
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(256 << 20, dtype=torch.uint8, device=key.device), "NHD", use_cuda_graph=True,
                use_tensor_cores=True, paged_kv_indptr_buffer=bounds, paged_kv_indices_buffer=indices,
                paged_kv_last_page_len_buffer=last,
            )  # fmt: skip
            given = {"q_data_type": query.dtype, "kv_data_type": key.dtype}
            wrapper.plan(bounds, indices, last, query.shape[1], heads, dim, _PAGE, **given)
            planned.append(wrapper)
        shape, strides = (batch * of_row, _PAGE, heads, dim), (_PAGE * heads * dim, heads * dim, dim, 1)
        output: Tensor = planned[0].run(query[:, :, 0], tuple(part.as_strided(shape, strides) for part in (key, value)))
        return output[:, :, None]

    return attend


def _fa4(device: str) -> Attend:
    if device != "cuda" or importlib.util.find_spec("flash_attn") is None:
        raise MissingError("needs flash-attn-4[cu13] and a CUDA device")
    from flash_attn.cute import flash_attn_func

    def attend(*given: Tensor) -> Tensor:
        # It splits the keys among programs by itself, where the device's kernels can.
        found = flash_attn_func(*(part.transpose(1, 2) for part in given), num_splits=0)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return attend


FORMS: dict[str, Callable[[str], Attend]] = {
    "sdpa-flash-folded": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION, True),
    "sdpa-flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION, False),
    "sdpa-cudnn-folded": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION, True),
    "sdpa-cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION, False),
    "decoder": _decoder,
    # These compile themselves first.
    "fa4": _fa4,
    "flashinfer": _flashinfer,
}
"""By name: what makes the form for a device, for calls that all have the same shapes."""


class StaticDense:
    """A model's step over dense keys and values: writes the new token's pair to the last row, and attends to all rows.

    On a GPU, the third step is captured, and replayed from then on. In a with block, the model has this attention.

    Args:
        model: a causal language model.
        form: the attention, of :data:`FORMS`.
        pairs: the keys and values of each layer, (B, H, T, D).
        fuse: compile the model's other operations.
    """

    NAME = "static_dense"

    def __init__(self, model: Any, form: str, pairs: Sequence[tuple[Tensor, ...]], *, fuse: bool = False) -> None:
        self.model, self._pairs = model, pairs
        self._before = model.config._attn_implementation
        self._attend_form = FORMS[form](model.device.type)
        self._forward = torch.compile(self._run, dynamic=False) if fuse else self._run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        batch, _, tokens, _ = pairs[0][0].shape
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._position = torch.full((batch, 1), tokens - 1, device=model.device)
        self._place = torch.tensor([tokens - 1], device=model.device)

    def __enter__(self) -> StaticDense:
        AttentionInterface.register(self.NAME, self._attend)
        self.model.set_attn_implementation(self.NAME)
        return self

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self._before)

    def __call__(self, token: Tensor) -> Tensor:
        """Logits (B, 1, V) behind the tokens (B, 1); the next step overwrites them."""
        self._ids.copy_(token)
        self._steps += 1
        if self._steps <= 2 or not token.is_cuda:
            return self._forward()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._forward()
            self._graph = graph
        self._graph.replay()
        return self._logits

    def _run(self) -> Tensor:
        given = {"input_ids": self._ids, "position_ids": self._position, "use_cache": False, "logits_to_keep": 1}
        logits: Tensor = self.model(**given).logits
        return logits

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        pair = self._pairs[module.layer_idx]
        for part, new in zip(pair, (key, value), strict=True):
            part.index_copy_(2, self._place, new)
        return self._attend_form(query, *pair).transpose(1, 2).contiguous(), None
