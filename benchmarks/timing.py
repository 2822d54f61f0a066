"""Times of attention calls: inputs as a model passes them, medians in milliseconds, CUDA graphs.

On a CPU, which serves to try the benchmarks, inputs are float32 and nothing is captured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GRAPHED = 32768
"""The most tokens whose calls are timed as CUDA graphs."""
_QUEUE = 8
Times = dict[str, float]


def inputs(
    query_heads: int, heads: int, dim: int, length: int, seed: int = 0, *, device: str = "cuda", batch: int = 1
) -> list[Tensor]:
    """Query, key and value as a model passes them, (B, heads, T, D) views of (B, T, heads, D), and a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    counts = query_heads, heads, heads, query_heads
    return [torch.randn(batch, length, count, dim, **options).transpose(1, 2) for count in counts]


def times(tensors: list[Tensor], attend: Callable[..., Tensor], *, repeats: int, graphed: bool) -> Times:
    """Medians in ms of ``forward`` and of forward + backward (``both``), and on a GPU peak memory over inputs in MiB.

    If graphs are timed, also of both passes without them: ``launched`` alone, and ``queued`` behind one another.
    """
    *given, gradient = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in given]

    def forward() -> None:
        with torch.no_grad():
            attend(*leaves)

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, gradient)

    both()
    found = {"forward": median(forward, repeats, graphed), "both": median(both, repeats, graphed)}
    if graphed:
        found["launched"] = median(both, repeats, False)
        found["queued"] = median(lambda: [both() for _ in range(_QUEUE)], repeats, False) / _QUEUE
    if gradient.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def median(run: Callable[[], object], repeats: int, graphed: bool) -> float:
    """Median of a call in ms, after calls that warm up; on a GPU by events, and of a captured graph if asked for."""
    if not torch.cuda.is_available():
        run()
        return statistics.median(_seconds(run) for _ in range(repeats)) * 1e3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run, repeats = graph.replay, 5 * repeats
    found = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
