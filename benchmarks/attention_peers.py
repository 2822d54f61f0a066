"""How fast are other attentions, per query-key pair, in the same process as LRSA's kernels and dense cuDNN?

    python benchmarks/attention_peers.py [--peers flash flex nsa …] [--cells 32/8/128:128/32:32768 …] [--seconds 140]

- ``flash``: dense causal attention, FlashAttention-2 as torch ships it (SDPA). ``fa4``: the package flash-attn-4.
- ``flex``: FlexAttention given the rule, over [sinks and kept tokens | all tokens]. Selection, block mask and the
  lookup of what is visible are built outside of the timing; the gather is inside.
- ``nsa``: the attention over selected blocks of Native Sparse Attention (arXiv 2502.11089), by flash-linear-attention.
  Each query attends to as many pairs as under the rule, up to half a block of 64, at given blocks: no selection is
  timed. ``nsa-published``: 16 of its blocks, selected by its compressed attention, which is timed too. Both need 16
  query heads per key-value head, so they have a cell of their own, with LRSA at the same shape.

Each peer is checked: on 1,024 tokens against float64, FlexAttention against LRSA. One that fails, or is missing, is
written with the reason, and tried again by the next run. ``efficiency`` is that of ``attention.py``, with the pairs of
the peer. Writes ``results/attention_peers.json``; ``--seconds`` and repeated runs as in ``attention.py``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from attention_cells import Cell, against, dense, gate, lrsa, parse, timed
from records import MissingError, Record, about
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from lrsa_lit.ops.sparse_attention import Rule, attended_pairs, compressed_at, raw_start, select, sparse_attention

CELLS = ["32/8/128:128/32:8192", "32/8/128:128/32:32768", "32/2/128:128/32:32768"]
CHECKED, TOLERANCE = 1024, 0.02
"""Tokens of the check, and the largest relative error, in bfloat16."""
BLOCK, PUBLISHED, GROUP = 64, 16, 16
"""Tokens of an NSA block, blocks that a query selects as published, and the fewest query heads per key-value head."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (1, Hq, T, D), keys and values (1, H, T, D) to the output (1, Hq, T, D)."""


def main(args: list[str] | None = None) -> int:
    started = time.perf_counter()
    peers: dict[str, Any] = {"nargs": "*", "default": list(PEERS), "choices": PEERS}
    options = parse(args, __doc__, CELLS, peers=peers)
    if not gate(options):
        print("correctness gate: RED")
        return 1
    packages = about("flash-attn-4", "fla-core", "flash-linear-attention", device=options.device)
    record = Record(options.out / "attention_peers.json", packages, (*Cell._fields, "who"))
    wanted = [
        ({**cell._asdict(), "who": name}, functools.partial(_measured, name, cell, options))
        for cell, name in itertools.product(options.cells, ["cudnn", "lrsa", *options.peers])
    ]
    for row in record.measure(wanted, started + options.seconds):
        _print(row)
    return 0


def _measured(name: str, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    # Once a process, so that all are compared with times of their own process.
    cudnn = dense(SDPBackend.CUDNN_ATTENTION, cell, options.repeats, options.device)
    if name == "cudnn":
        return {**cudnn, "pair_share": 1.0}
    tensors = cell.inputs(options.device)
    if name == "lrsa":
        found = lrsa(cell, tensors, options.repeats)
        return {**found, **against(found, cudnn, cell.pair_share), "pair_share": cell.pair_share}
    make, share = PEERS[name]
    attend = make(cell, tensors)
    # Kernels that tune or compile themselves are not captured.
    found = timed(cell, tensors, attend, options.repeats, graphed=name == "flash")
    # After the times, because kernels tune themselves for the first call that they see.
    error = _error(name, cell, tensors, attend)
    if error is not None and error > TOLERANCE:
        raise MissingError(f"its relative error is {error:.3f}")
    pairs = share(cell)
    return {**found, **against(found, cudnn, pairs), "pair_share": pairs, "error": error}


@torch.no_grad()
def _error(name: str, cell: Cell, tensors: list[Tensor], attend: Attend) -> float | None:
    """Relative error of the output; None where no reference states its pairs.

    Of FlexAttention, which compiles for each length, against LRSA's operator; of others on the first tokens, in
    float64.
    """
    query, key, value, _ = tensors
    if name == "nsa-published":
        return None
    if name == "flex":
        truth = sparse_attention(query, key, value, cell.rule, selection=select(key, value, cell.rule))
        return _relative(attend(query, key, value), truth)
    few = cell._replace(tokens=min(CHECKED, cell.tokens))
    parts = [part[:, :, : few.tokens].transpose(1, 2).contiguous().transpose(1, 2) for part in tensors]
    mask = _nsa_visible(few, query.device) if name == "nsa" else None
    exact = [part.double() for part in parts[:3]]
    truth = scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return _relative(PEERS[name][0](few, parts)(*parts[:3]), truth)


def _relative(output: Tensor, truth: Tensor) -> float:
    return float((output.double() - truth).norm() / truth.double().norm())


def flash(cell: Cell, tensors: list[Tensor]) -> Attend:
    """FlashAttention-2, dense."""
    if not tensors[0].is_cuda:
        raise MissingError("needs a CUDA device")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attend


def fa4(cell: Cell, tensors: list[Tensor]) -> Attend:
    """FlashAttention-4, dense; on Hopper it compiles CuTe kernels on first use."""
    if not tensors[0].is_cuda or importlib.util.find_spec("flash_attn") is None:
        raise MissingError("needs flash-attn-4[cu13] and a CUDA device")
    from flash_attn.cute import flash_attn_func

    def attend(*given: Tensor) -> Tensor:
        found = flash_attn_func(*(part.transpose(1, 2) for part in given), causal=True)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return attend


def flex(cell: Cell, tensors: list[Tensor], compiled: bool = True) -> Attend:
    """FlexAttention with the rule, in the form that suits it best: over [sinks and kept tokens | all tokens]."""
    key, value = tensors[1:3]
    device, rule, length = key.device, cell.rule, cell.tokens
    counts = compressed_at(torch.arange(length, device=device), rule)
    starts, compact_ends = raw_start(counts, rule), _compact_pairs(counts, rule)
    kept = select(key, value, rule).indices.flatten(2)
    sinks = torch.arange(rule.sink_size if kept.shape[2] else 0, device=device).expand(*kept.shape[:2], -1)
    rows = torch.cat([sinks, kept], dim=2)[..., None].expand(-1, -1, -1, key.shape[3])
    n_compact = rows.shape[2]

    def visible(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return (j < compact_ends[t]) | ((j >= n_compact + starts[t]) & (j <= n_compact + t))

    on_gpu = compiled and key.is_cuda
    mask = create_block_mask(visible, None, None, length, n_compact + length, device=str(device), _compile=on_gpu)
    # Not with symbolic lengths, for which the second cell would be compiled.
    run = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (torch.cat([part.gather(2, rows), part], dim=2) for part in (key, value))
        return run(query, key, value, block_mask=mask, enable_gqa=query.shape[1] > key.shape[1])

    return attend


def _compact_pairs(partitions: Tensor, rule: Rule) -> Tensor:
    """Sinks and kept pairs that queries see beside raw tokens, for their numbers of compressed partitions."""
    return torch.where(partitions > 0, rule.sink_size + partitions * rule.top_k, 0)


def nsa(cell: Cell, tensors: list[Tensor]) -> Attend:
    """NSA's attention over given blocks, as many pairs as under the rule."""
    parallel_nsa = _parallel_nsa(cell)
    blocks, counts = nsa_blocks(cell, tensors[0].device)

    def attend(*given: Tensor) -> Tensor:
        rows = (part.transpose(1, 2) for part in given)
        output: Tensor = parallel_nsa(*rows, block_indices=blocks, block_counts=counts, block_size=BLOCK)
        return output.transpose(1, 2)

    return attend


def nsa_published(cell: Cell, tensors: list[Tensor]) -> Attend:
    """NSA with its own selection and compressed attention, gates of one half, and no window."""
    parallel_nsa = _parallel_nsa(cell)
    gates = tensors[0].new_full((1, cell.tokens, cell.query_heads), 0.5)

    def attend(*given: Tensor) -> Tensor:
        rows = (part.transpose(1, 2) for part in given)
        output: Tensor = parallel_nsa(*rows, g_cmp=gates, g_slc=gates, block_counts=PUBLISHED, block_size=BLOCK)
        return output.transpose(1, 2)

    return attend


def _parallel_nsa(cell: Cell) -> Callable[..., Tensor]:
    if importlib.util.find_spec("fla") is None:
        raise MissingError("needs fla-core, which is not installed")
    if cell.query_heads < GROUP * cell.heads:
        raise MissingError(f"needs {GROUP} query heads per key-value head")
    from fla.ops.nsa import parallel_nsa

    found: Callable[..., Tensor] = parallel_nsa
    return found


def nsa_blocks(cell: Cell, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks (1, T, H, most) that queries attend to, spread evenly and with their own, and their numbers (1, T, H)."""
    t = torch.arange(cell.tokens)
    seen = compressed_at(t, cell.rule)
    pairs = _compact_pairs(seen, cell.rule) + t + 1 - raw_start(seen, cell.rule)
    own = t // BLOCK
    # A query's own block counts for what it sees of it.
    counts = torch.minimum(((pairs - t % BLOCK - 1) / BLOCK).round().long().clamp(min=0), own) + 1
    places = torch.arange(int(counts.max()))
    blocks = own[:, None] - places * (own + 1)[:, None] // counts[:, None]
    shape = 1, cell.tokens, cell.heads
    blocks = blocks.clamp(min=0)[None, :, None].expand(*shape, -1).contiguous()
    return blocks.to(device), counts[None, :, None].expand(shape).contiguous().to(device)


def _nsa_visible(cell: Cell, device: torch.device) -> Tensor:
    """(T, T): the keys that :func:`nsa_blocks` lets queries see."""
    blocks, counts = (part[0, :, 0] for part in nsa_blocks(cell, device))
    listed = torch.arange(blocks.shape[1], device=device) < counts[:, None]
    of_blocks = torch.zeros(cell.tokens, -(-cell.tokens // BLOCK) + 1, dtype=torch.bool, device=device)
    of_blocks.scatter_(1, torch.where(listed, blocks, of_blocks.shape[1] - 1), True)
    return of_blocks[:, :-1].repeat_interleave(BLOCK, dim=1)[:, : cell.tokens].tril()


def _dense_share(cell: Cell) -> float:
    return 1.0


def _nsa_share(cell: Cell) -> float:
    _, counts = nsa_blocks(cell, torch.device("cpu"))
    pairs = (counts[0, :, 0] - 1) * BLOCK + torch.arange(cell.tokens) % BLOCK + 1
    return int(pairs.sum()) / attended_pairs(cell.tokens, None)


def _published_share(cell: Cell) -> float:
    """Selected blocks and compressed ones, one pair each."""
    pairs = sum(
        min(own + 1, PUBLISHED) * BLOCK - (BLOCK - 1 - t % BLOCK) + own
        for t, own in ((t, t // BLOCK) for t in range(cell.tokens))
    )
    return pairs / attended_pairs(cell.tokens, None)


PEERS: dict[str, tuple[Callable[[Cell, list[Tensor]], Attend], Callable[[Cell], float]]] = {
    "flash": (flash, _dense_share),
    "fa4": (fa4, _dense_share),
    "flex": (flex, lambda cell: cell.pair_share),
    "nsa": (nsa, _nsa_share),
    "nsa-published": (nsa_published, _published_share),
}
"""By name: what makes the attention for a cell, and the share of dense pairs that it attends to."""


def _print(row: dict[str, Any]) -> None:
    head = f"{Cell(*(row[name] for name in Cell._fields))!s:34} {row['who']:14}"
    if "skipped" in row:
        print(f"{head} skipped: {row['skipped']}", flush=True)
        return
    # cuDNN is the measure of the others.
    numbers = "" if row["who"] == "cudnn" else "efficiency {efficiency_forward:.3f}/{efficiency_both:.3f}".format(**row)
    print(f"{head} {row['forward']:.3f}/{row['both']:.3f} ms {numbers}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
