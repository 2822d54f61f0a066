"""What devices that share rows send each other, and how long that may take beside their work: a model on paper.

``python benchmarks/context_cost.py`` prints the tables of docs/context-parallelism.md. Bytes and attended pairs are
counted by the package's own plans; times follow from them and from the assumed rates below, and are no measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrsa_lit.context_parallel import Shares
from lrsa_lit.context_parallel.share_plan import Plan
from lrsa_lit.ops.sparse_attention import Rule, compressed_at, raw_start
from lrsa_lit.ops.sparse_attention.geometry import compact_size

RULE = Rule(sink_size=16, lag_size=128, top_k=16)
# Llama-3.1-8B in bfloat16: query and key-value heads, channels, weights of a layer.
QUERY_HEADS, HEADS, DIM, LAYER_WEIGHTS = 32, 8, 128, 218_112_000
PAIR_BYTES = 2 * HEADS * DIM * 2
# Assumed: arithmetic of a device, and what it receives a second, within a host of eight and between hosts.
FLOPS, IN_HOST, BETWEEN_HOSTS, HOST = 400e12, 300e9, 40e9, 8


class Cost(NamedTuple):
    """Of one layer's forward pass, on the device that has the most of each."""

    halo_bytes: float
    gathered_bytes: float
    ring_bytes: float
    attention_seconds: float
    layer_seconds: float
    transfer_seconds: float
    balance: float


def cost(devices: int, tokens: int) -> Cost:
    """The cost of a row of so many tokens that so many devices share."""
    shares = Shares.cut((0, tokens), devices, RULE)
    plan = Plan(shares, RULE)
    until = _attended_until(tokens)
    pairs = [sum(int(until[stop] - until[start]) for start, stop in shares.spans(rank)) for rank in range(devices)]
    held = [sum(stop - start for start, stop in shares.spans(rank)) for rank in range(devices)]
    halos, compact = (max(plan.received(rank)[each] for rank in range(devices)) for each in (0, 1))
    attention = 4 * QUERY_HEADS * DIM * max(pairs) / FLOPS
    rate = IN_HOST if devices <= HOST else BETWEEN_HOSTS
    return Cost(
        halos * PAIR_BYTES,
        compact * PAIR_BYTES,
        tokens * (devices - 1) / devices * PAIR_BYTES,
        attention,
        attention + 2 * LAYER_WEIGHTS * max(held) / FLOPS,
        (halos + compact) * PAIR_BYTES / rate,
        max(pairs) * devices / sum(pairs),
    )


def _attended_until(tokens: int) -> Tensor:
    """(T + 1,) the query-key pairs of all positions before each."""
    position = torch.arange(tokens)
    partitions = compressed_at(position, RULE)
    seen = compact_size(partitions, RULE) + position - raw_start(partitions, RULE) + 1
    return torch.nn.functional.pad(seen.cumsum(0), (1, 0))


def main() -> None:
    for each in (16_384, 65_536):
        print(f"\n{each:,} tokens a device:\n")
        print("| GPUs | tokens of a row | halos | compact pairs | of a ring | most work / mean | layer | transfers |")
        print("|---|---|---|---|---|---|---|---|")
        for devices in (8, 16, 64, 256, 1024):
            of = cost(devices, devices * each)
            compact, ring = of.gathered_bytes / 1e6, of.gathered_bytes / of.ring_bytes
            print(
                f"| {devices:,} | {devices * each:,} | {of.halo_bytes / 1e6:.1f} MB | {compact:,.0f} MB "
                f"| {ring:.3f} | {of.balance:.4f} | {1e3 * of.layer_seconds:,.1f} ms "
                f"| {1e3 * of.transfer_seconds:,.1f} ms |"
            )


if __name__ == "__main__":
    main()
