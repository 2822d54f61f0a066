"""An oracle of lag-relative sparse attention: float64, loops over heads, tokens and queries, nothing of the package.

It is written from the definition in the operator's README.md and held to the recorded runs in tests/vectors, so that
it can judge the package. A rule is anything with the attributes sink_size, lag_size, top_k, chunk_size, compressor.

Dimensions: B batch, H key-value heads, Hq query heads, T tokens, D head_dim, S sink_size, L lag_size, K top_k.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

VECTORS = Path(__file__).parent / "vectors"

Compress = Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""(L, D) keys, values, next keys and next values of one head and partition -> (K, D) keys and values."""


def narrowed(model: Any, grouping: str, ratio: float = 0.5) -> Any:
    """A model whose keys and values come from latents of low rank, in place; one without k_proj stays as it is."""
    from lrsa_lit.models import LowRank
    from lrsa_lit.models.factors import factor

    with contextlib.suppress(ValueError):
        factor(model, LowRank(ratio=ratio, grouping=grouping))
        model.save_pretrained = _not_saved
    return model


def _not_saved(*_: object, **__: object) -> None:
    pytest.skip("plain transformers loads no factors; tests of exports save and load them")


class Recorded(NamedTuple):
    """A run of the published cache: keys, values (1, H, T, D), visible (H, T, T), kept (H, stored) and its numbers."""

    key: Tensor
    value: Tensor
    visible: Tensor
    kept: np.ndarray
    params: dict[str, int]


def recorded(name: str) -> Recorded:
    data = np.load(VECTORS / f"{name}.npz")
    length = data["keys"].shape[2]
    visible = np.unpackbits(data["visible"], axis=-1)[..., :length].astype(bool)
    key, value = torch.from_numpy(data["keys"]), torch.from_numpy(data["values"])
    return Recorded(key, value, torch.from_numpy(visible), data["kept"], json.loads(str(data["params"])))


def partitions_compressed(t: int, rule: Any) -> int:
    """P(t)."""
    first = rule.sink_size + 2 * rule.lag_size
    if t < first:
        return 0
    chunk = rule.chunk_size or rule.lag_size
    begin = first + ((t - first) // chunk) * chunk
    return (begin - rule.sink_size) // rule.lag_size - 1


def lag_spread(tokens: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Spread (L,) over channels of the tokens (L, D) of a partition, in the range of those of the next one."""
    low, high = reference.min(axis=0), reference.max(axis=0)
    scaled = np.zeros_like(tokens)
    for channel in range(tokens.shape[1]):
        span = high[channel] - low[channel]
        if span > 1e-6 * max(abs(low[channel]), abs(high[channel])):
            scaled[:, channel] = (tokens[:, channel] - low[channel]) / span
    return scaled.std(axis=1, ddof=1)


def log_softmax(spread: np.ndarray) -> np.ndarray:
    """(L,) -> (L,)."""
    return spread - np.logaddexp.reduce(spread)


def lag_relative_logs(key: Tensor, value: Tensor, next_key: Tensor, next_value: Tensor, rule: Any) -> np.ndarray:
    """Logarithms (L,) of the scores of the tokens (L, D) of one head and partition, more exact than float64 if can be.

    The logarithms tell apart what float64 rounds to one score: 0 beside a token that dominates.
    """
    arrays = [tensor.detach().double().numpy().astype(np.longdouble) for tensor in (key, value, next_key, next_value)]
    of_keys = log_softmax(lag_spread(arrays[0], arrays[2]))
    if rule.compressor.value_weight == 0:
        return of_keys
    return np.logaddexp(
        of_keys, np.log(np.longdouble(rule.compressor.value_weight)) + log_softmax(lag_spread(arrays[1], arrays[3]))
    )


def lag_relative_kept(key: Tensor, value: Tensor, next_key: Tensor, next_value: Tensor, rule: Any) -> list[int]:
    """The K of L places that one head keeps of a partition, ascending; ties go to the earlier token."""
    scores = lag_relative_logs(key, value, next_key, next_value, rule)
    ranked = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return sorted(ranked[: rule.top_k])


def lag_relative(key: Tensor, value: Tensor, next_key: Tensor, next_value: Tensor, rule: Any) -> tuple[Tensor, Tensor]:
    kept = lag_relative_kept(key, value, next_key, next_value, rule)
    return key[kept], value[kept]


def mean_pool(key: Tensor, value: Tensor, next_key: Tensor, next_value: Tensor, rule: Any) -> tuple[Tensor, Tensor]:
    """Means of the groups of tokens with equal floor(l K / L)."""
    groups = [[place for place in range(len(key)) if place * rule.top_k // len(key) == g] for g in range(rule.top_k)]
    keys, values = ([tokens[group].mean(dim=0) for group in groups] for tokens in (key, value))
    return (torch.stack(keys), torch.stack(values)) if groups else (key[:0], value[:0])


def oracle_kept(key: Tensor, value: Tensor, rule: Any) -> list[list[int]]:
    """Positions that one head keeps of each partition compressed by the end of a sequence (T, D)."""
    kept = []
    for p in range(partitions_compressed(len(key) - 1, rule)):
        start = rule.sink_size + p * rule.lag_size
        here, after = slice(start, start + rule.lag_size), slice(start + rule.lag_size, start + 2 * rule.lag_size)
        places = lag_relative_kept(key[here], value[here], key[after], value[after], rule)
        kept.append([start + place for place in places])
    return kept


def oracle_mask(key: Tensor, value: Tensor, rule: Any) -> Tensor:
    """What each query of one sequence sees: bool (B, H, T queries, T keys)."""
    batch, heads, length, _ = key.shape
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        for head in range(heads):
            kept = oracle_kept(key[row, head], value[row, head], rule)
            for t in range(length):
                count = partitions_compressed(t, rule)
                raw_from = rule.sink_size + count * rule.lag_size if count else 0
                sinks = range(rule.sink_size if count else 0)
                seen = [*sinks, *itertools.chain(*kept[:count]), *range(raw_from, t + 1)]
                mask[row, head, t, seen] = True
    return mask


def oracle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Any,
    *,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
    compress: Compress = lag_relative,
) -> Tensor:
    """(B, Hq, Tq, D), differentiable; ``lengths`` of the sequences packed in each row. Inputs should be float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    rows = []
    for row in range(query.shape[0]):
        heads = []
        for head in range(query.shape[1]):
            start, outputs = 0, []
            for length in lengths or [key.shape[2]]:
                q, k, v = (x[row, h, start : start + length] for x, h in
                           ((query, head), (key, head // group), (value, head // group)))  # fmt: skip
                outputs.append(_one_sequence(q, k, v, rule, scale, compress))
                start += length
            heads.append(torch.cat(outputs))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, rule: Any, scale: float, compress: Compress) -> Tensor:
    """Attention of one head: the last Tq of T tokens (T, D)."""
    sink, lag, length = rule.sink_size, rule.lag_size, len(key)
    compact = [(key[:sink], value[:sink])]
    for p in range(partitions_compressed(length - 1, rule)):
        here, after = (slice(sink + lag * n, sink + lag * (n + 1)) for n in (p, p + 1))
        compact.append(compress(key[here], value[here], key[after], value[after], rule))
    outputs = [query[:0]]
    for index, t in enumerate(range(length - len(query), length)):
        count = partitions_compressed(t, rule)
        raw_from = sink + count * lag if count else 0
        seen = compact[: count + 1] if count else []
        keys = torch.cat([*(pair[0] for pair in seen), key[raw_from : t + 1]])
        values = torch.cat([*(pair[1] for pair in seen), value[raw_from : t + 1]])
        outputs.append((torch.softmax(keys @ query[index] * scale, dim=0) @ values)[None])
    return torch.cat(outputs)


def random_qkv(
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    group: int = 2,
    dim: int = 5,
    queries: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, H·group, Tq, D), key and value (B, H, T, D), normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads * group, queries or length, dim), *[(batch, heads, length, dim)] * 2]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tuple(tensor.requires_grad_(grad) for tensor in made)  # type: ignore[return-value]


def boundaries(lengths: Sequence[int]) -> Tensor:
    """int32 (N + 1,) cumulative lengths."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def quiet_trainer(**options: Any) -> Any:
    """A trainer on the CPU that shows and keeps nothing."""
    import lightning

    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(**{"accelerator": "cpu", **dict.fromkeys(parts, False), **options})


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def one_line(error: BaseException) -> str:
    """The message of a user error, which must be one line."""
    message = str(error)
    assert message, "empty message"
    assert "\n" not in message
    return message


@contextlib.contextmanager
def refused(
    field: str, value: object = ..., allowed: str = "", *, reason: str = ""
) -> Iterator[pytest.ExceptionInfo[ValueError]]:
    """A block that ends in a user error, in one line; ``allowed`` and ``reason`` are parts of what it says."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it is about is what matters
        yield caught
    error = caught.value
    assert error.field == field
    assert value is ... or error.value is value or error.value == value
    assert allowed in error.allowed
    assert reason in error.reason
    one_line(error)
