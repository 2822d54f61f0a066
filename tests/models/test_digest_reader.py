"""Cross-attention of digests against recorded runs of its definition and a plain computation in float64."""

import json
import math

import pytest
import torch
from helpers import VECTORS, refused
from transformers import LlamaConfig

from lrsa_lit.models.digest_reader import DigestReader
from lrsa_lit.systems.icformer import ICFormer

RECORDED = json.loads((VECTORS / "systems/icformer.json").read_text())
NORMS = {"n_query": "norm_query", "n_context": "norm_context", "n_mlp": "norm_inner"}


def config(**changes):
    sizes = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    return LlamaConfig(**sizes | {"intermediate_size": 10, "rope_theta": 1000.0} | changes)


def made(count=3, layers=2, **changes):
    torch.manual_seed(0)
    reader = DigestReader(config(**changes), count, layers, "normal").double()
    with torch.no_grad():
        for weight in reader.parameters():
            weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 2 else 0.2) + (weight.ndim == 1))
    return reader


@pytest.fixture
def recorded():
    numbers = {name: RECORDED[name] for name in ("layers", "eps", "theta")}
    shape = config(hidden_size=RECORDED["hidden"], num_attention_heads=RECORDED["heads"], head_dim=None,
                   num_key_value_heads=RECORDED["kv_heads"], intermediate_size=RECORDED["intermediate"],
                   rms_norm_eps=numbers["eps"], rope_theta=numbers["theta"])  # fmt: skip
    reader = DigestReader(shape, len(RECORDED["digest"]), numbers["layers"]).double()
    weights = {"initial": RECORDED["digest"], "norm.weight": RECORDED["final_norm"]}
    for layer, parts in enumerate(RECORDED["weights"]):
        weights |= {f"layers.{layer}.{NORMS.get(name, name)}.weight": value for name, value in parts.items()}
    reader.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()})
    return reader


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_recorded_digests_of_one_chunk(recorded, dtype, error):
    context = torch.tensor([RECORDED["context"]], dtype=dtype)
    found = recorded.to(dtype)(context, torch.tensor([5]))
    torch.testing.assert_close(found[0], torch.tensor(RECORDED["output"], dtype=dtype), rtol=0, atol=error)


def test_recorded_digests_of_two_chunks_of_different_lengths(recorded):
    wanted = RECORDED["chunked_max_3"]
    spans = ICFormer(3, 3).spans(5)
    assert [list(span) for span in spans] == wanted["spans"]
    context = torch.tensor(RECORDED["context"], dtype=torch.float64)
    padded = torch.full((2, 3, RECORDED["hidden"]), 1e3, dtype=torch.float64)
    for row, (start, stop) in enumerate(spans):
        padded[row, : stop - start] = context[start:stop]
    found = recorded(padded, torch.tensor([3, 2])).flatten(0, 1)
    torch.testing.assert_close(found, torch.tensor(wanted["output"], dtype=torch.float64), rtol=0, atol=1e-6)


def test_recorded_spans():
    assert [list(span) for span in ICFormer(128, 512).spans(1030)] == RECORDED["spans_of_1030_by_512"]


@pytest.mark.parametrize("length", range(40))
def test_chunks_are_few_and_equal_but_for_the_last(length):
    spans = ICFormer(2, 7).spans(length)
    assert [at for span in spans for at in range(*span)] == list(range(length))
    sizes = [stop - start for start, stop in spans]
    assert len(sizes) == math.ceil(length / 7)
    assert len(set(sizes[:-1])) <= 1
    assert all(1 <= size <= max(sizes[0], 1) <= 7 for size in sizes)


def plain(reader, context):
    """(k, h) of one chunk (n, h), head by head and digest by digest."""
    initial, dim = reader.initial, reader.layers[0].dim
    both, (count, _), n = torch.cat([context, initial]), initial.shape, len(context)

    def norm(weight, x):
        return weight * x / (x.square().mean(dim=-1, keepdim=True) + reader.norm.eps).sqrt()

    def turned(x, position):
        half = dim // 2
        angles = position * 1000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / dim)
        first, second = x[:half], x[half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])

    hidden = initial
    for layer in reader.layers:
        kv = norm(layer.norm_context.weight, both)
        rows = []
        for i in range(count):
            query, heads = layer.q.weight @ norm(layer.norm_query.weight, hidden[i]), []
            for head in range(4):
                own = slice(head // 2 * dim, (head // 2 + 1) * dim)
                q = turned(query[head * dim : (head + 1) * dim], n + i)
                seen = range(n + i + 1)
                keys = torch.stack([turned(layer.k.weight[own] @ kv[j], j) for j in seen])
                values = torch.stack([layer.v.weight[own] @ kv[j] for j in seen])
                heads.append(torch.softmax(keys @ q / dim**0.5, dim=0) @ values)
            rows.append(hidden[i] + layer.o.weight @ torch.cat(heads))
        hidden = torch.stack(rows)
        inner = norm(layer.norm_inner.weight, hidden)
        gate, up = inner @ layer.gate.weight.T, inner @ layer.up.weight.T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ layer.down.weight.T
    return norm(reader.norm.weight, hidden)


def test_outputs_and_gradients_are_those_of_a_plain_computation():
    reader, lengths = made(), [7, 1, 4]
    context = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    wanted = torch.stack([plain(reader, row[:length]) for row, length in zip(context, lengths, strict=True)])
    found = reader(context, torch.tensor(lengths))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights, above = [context, *reader.parameters()], torch.randn_like(found)
    slopes = torch.autograd.grad((found * above).sum(), weights)
    for slope, exact in zip(slopes, torch.autograd.grad((wanted * above).sum(), weights), strict=True):
        torch.testing.assert_close(slope, exact, rtol=1e-8, atol=1e-9)
    for row, length in enumerate(lengths):
        assert not slopes[0][row, length:].any()


def test_a_chunk_alone_is_what_it_is_among_longer_ones():
    reader, context = made(), torch.randn(2, 9, 12, dtype=torch.float64)
    together = reader(context, torch.tensor([9, 2]))
    torch.testing.assert_close(together[1:], reader(context[1:, :2], torch.tensor([2])), rtol=0, atol=1e-12)


def test_digests_that_begin_as_zeros_have_finite_gradients():
    reader = DigestReader(config(), 3, 2)
    assert not reader.initial.any()
    found = reader(torch.randn(2, 5, 12), torch.tensor([5, 3]))
    # Queries are zero: attention is uniform, over n + i + 1 tokens for digest i, whose own keys and values are zero.
    assert not found[:, 0].equal(found[:, 1])
    slopes = torch.autograd.grad(found.square().sum(), list(reader.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)
    assert slopes[0].any()


def test_a_base_without_rotary_positions_of_all_channels_is_refused():
    shape = config()
    shape.rope_parameters = {**shape.rope_parameters, "partial_rotary_factor": 0.5}
    with refused("backbone", "llama", reason="does not rotate all channels"):
        DigestReader(shape, 3, 2)
