"""Selection by scores that travel with the keys, and the files that gates come from."""

import itertools

import pytest
import torch
from helpers import boundaries, oracle_attention, random_qkv, refused
from safetensors.torch import save_file
from torch.nn.functional import pad

from lrsa_lit.ops.sparse_attention import (
    Compressor,
    HeadRules,
    KeyValueStream,
    Rule,
    StraightThrough,
    TokenGate,
    bare_keys,
    select,
    sparse_attention,
    with_scores,
)
from lrsa_lit.ops.sparse_attention.token_scores import scores_of

RULE = Rule(3, 8, 3, compressor=TokenGate())


def drawn(length, **options):
    query, key, value = random_qkv(length, **options)
    scores = torch.randn(key.shape[:3], generator=torch.Generator().manual_seed(1), dtype=key.dtype)
    return query, key, value, scores


def by_last_channel(key, value, next_key, next_value, rule):
    """Of one head and partition, in the oracle: the score stands behind the channels of a key."""
    order = sorted(range(len(key)), key=lambda token: (-float(key[token, -1].detach()), token))
    kept = sorted(order[: rule.top_k])
    # The channel is not attended to.
    return pad(key[kept][:, :-1], (0, 1)), value[kept]


@pytest.mark.parametrize("lengths", [[61], [30, 1, 30]], ids=["alone", "packed"])
@pytest.mark.parametrize("group", [1, 3])
def test_it_is_the_oracle_that_keeps_the_highest_scores(lengths, group):
    query, key, value, scores = drawn(61, group=group, dim=5)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    packing = boundaries(lengths) if len(lengths) > 1 else None
    found = sparse_attention(query, with_scores(key, scores), value, RULE, cu_seqlens=packing)
    wide = torch.cat([key, scores[..., None]], dim=-1)
    given = pad(query, (0, 1)), wide, pad(value, (0, 1))
    expected = oracle_attention(*given, RULE, lengths=lengths, scale=5**-0.5, compress=by_last_channel)[..., :-1]
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_scores_keep_more_digits_than_keys_have(dtype):
    # 16 bits, or all of them.
    scores = torch.tensor([1.0, 1 + 2**-15, -3.0, 1 - 2**-16], dtype=torch.float32)[None, None]
    key = torch.randn(1, 1, 4, 8).to(dtype)
    assert scores_of(with_scores(key, scores)).argsort().equal(scores.argsort())
    value = torch.randn(1, 1, 4, 8).to(dtype)
    assert bare_keys(with_scores(key, scores), value, TokenGate()).equal(key)


@pytest.mark.parametrize("sizes", [[70], [1, 17, 1, 30, 21], [50] + [1] * 20], ids=["at once", "odd", "token by token"])
def test_a_stream_carries_the_scores_until_their_partition_is_judged(sizes):
    query, key, value, scores = drawn(70, batch=2)
    wide, stream = with_scores(key, scores), KeyValueStream(RULE)
    parts = [
        stream.attend(*(x[:, :, start:stop] for x in (query, wide, value)), 5**-0.5)
        for start, stop in itertools.pairwise([0, *itertools.accumulate(sizes)])
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), sparse_attention(query, wide, value, RULE))
    assert stream.stored[0].shape == stream.stored[1].shape
    # Eight channels more, of each key.
    held = stream.stored[0].shape[2]
    assert stream.nbytes == 2 * 2 * held * (5 + 5 + 8) * 8


def test_kernels_stream_what_eager_pytorch_does():
    pytest.importorskip("triton")
    from ops.triton.oracle import inputs

    query, key, value, _ = inputs(1, 2, 1, 40, 16)
    wide = with_scores(key, torch.randn(key.shape[:3], device=key.device))
    stream, start, parts = KeyValueStream(RULE, "triton"), 0, []
    for size in (22, 16, 1, 1):
        part = slice(start, start + size)
        parts.append(stream.attend(query[:, :, part], wide[:, :, part], value[:, :, part], 0.25))
        start += size
    expected = sparse_attention(query, wide, value, RULE, impl="eager")
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=1e-5)


def test_heads_of_their_own_k_may_be_dense():
    query, key, value, scores = drawn(60)
    wide, rules = with_scores(key, scores), HeadRules(RULE, (2, 8))
    found = sparse_attention(query, wide, value, rules)
    alone = [sparse_attention(query, wide, value, RULE.replace(top_k=top_k)) for top_k in rules.top_k]
    torch.testing.assert_close(found, torch.cat([alone[0][:, :2], alone[1][:, 2:]], dim=1))


def test_keys_without_scores_are_refused():
    query, key, value, _ = drawn(60)
    for call in (lambda: sparse_attention(query, key, value, RULE), lambda: select(key, value, RULE)):
        with refused("key", reason="has no token scores, which TokenGate needs"):
            call()
    with refused("of", "TokenGate", "other than StraightThrough and TokenGate"):
        StraightThrough(TokenGate())


@pytest.fixture
def file(tmp_path):
    save_file({"token_gates": torch.arange(24.0).view(2, 3, 4)}, tmp_path / "gates.safetensors")
    return tmp_path / "gates.safetensors"


def test_gates_come_from_a_file_that_stays_the_same(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    gates = TokenGate("gates.safetensors")
    assert gates == TokenGate(str(file))
    assert gates.gate(1, 2, 3, 4).equal(torch.arange(12.0, 24.0).view(3, 4))
    stored = gates.to_dict()
    assert Compressor.from_dict(stored) == gates
    with refused(
        "compressor.init_args.weights", reason="holds gates of 2 layers of 3 heads and width 4; the model has 2 of 1"
    ):
        gates.gate(0, 2, 1, 4)
    save_file({"token_gates": torch.ones(2, 3, 4)}, file)
    with refused("compressor.init_args.weights", reason="has another SHA-256 than the gates that were used"):
        Compressor.from_dict(stored)
    file.unlink()
    with refused("compressor.init_args.weights", reason="cannot be read (No such file"):
        Compressor.from_dict(stored)


def test_a_file_without_gates_is_refused(tmp_path):
    (tmp_path / "text").write_text("gates")
    with refused("weights", reason="is not a safetensors file"):
        TokenGate(str(tmp_path / "text"))
    for number, wrong in enumerate([torch.ones(3, 4), torch.full((1, 1, 1), torch.nan), torch.ones(1, 1, 1).int()]):
        save_file({"token_gates": wrong}, path := tmp_path / f"{number}")
        with refused("weights", reason="has no tensor token_gates (layers, heads, width) of finite numbers"):
            TokenGate(str(path))
    with refused("seed", 0.5):
        TokenGate(seed=0.5)
    with refused("sha256", "00"):
        TokenGate(sha256="00")


def test_random_gates_differ_by_layer_and_seed_alone():
    gates = [TokenGate(seed=seed).gate(layer, 9, 2, 4) for seed, layer in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert gates[0].equal(gates[3])
    assert not gates[0].equal(gates[1])
    assert not gates[0].equal(gates[2])
