"""A compressor keeps of a sequence what it keeps alone, whatever stands beside it and however it comes in."""

import itertools
import json

import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER
from helpers import boundaries, random_qkv
from torch.nn.functional import scaled_dot_product_attention

from lrsa_lit.attention import LRSACache, LRSAConfig, cache_argument, enable
from lrsa_lit.cli.main import main
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import (
    Compressor,
    LagRelative,
    Partitions,
    Rotary,
    Selector,
    select,
    sparse_attention,
    with_scores,
)

LENGTHS = [1, 60, 0, 19, 41]
SPLITS = {"at once": [70], "odd": [1, 17, 1, 30, 21], "token by token": [50] + [1] * 20}
COLUMNS = 75


@pytest.fixture(scope="module")
def config(compressor):
    return LRSAConfig(sink_size=3, lag_size=8, top_k=3, compressor=compressor)


@pytest.fixture(scope="module")
def rule(config):
    """With a rotation of two channels, for those that need one: there are tests of as few."""
    return config.rule.replace(rotary=Rotary((0.7,)))


@pytest.fixture(scope="module")
def model(config):
    """In float64, but for what transformers computes in float32."""
    return enable(tiny_model(hidden_size=32, num_heads=4, num_kv_heads=2).double().eval(), config)


def drawn(rule, length, **options):
    """Queries, keys and values, and scores with the keys for a compressor that takes some."""
    query, key, value = random_qkv(length, **options)
    if rule.compressor.takes_scores:
        scores = torch.randn(key.shape[:3], generator=torch.Generator().manual_seed(1), dtype=key.dtype)
        key = with_scores(key.detach(), scores).requires_grad_(key.requires_grad)
    return query, key, value


def tokens(rows, length, seed=0):
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def blocks():
    return [slice(start, stop) for start, stop in itertools.pairwise(boundaries(LENGTHS).tolist()) if stop > start]


def test_packed_sequences_get_what_each_gets_alone(rule):
    tensors = drawn(rule, sum(LENGTHS), grad=True)
    packed = sparse_attention(*tensors, rule, cu_seqlens=boundaries(LENGTHS))
    alone = torch.cat([sparse_attention(*(x[:, :, block] for x in tensors), rule) for block in blocks()], dim=2)
    torch.testing.assert_close(packed, alone)
    gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in (packed, alone)]
    torch.testing.assert_close(*gradients)


def test_places_make_no_difference_to_one_that_ignores_them(rule):
    if not rule.compressor.ignores_place:
        pytest.skip("it may depend on where a partition is")
    _, key, value = drawn(rule, 6 * rule.lag_size)
    pairs = [
        x.unflatten(2, (3, 2 * rule.lag_size)).unflatten(3, (2, -1))[:, :, :, n] for n in (0, 1) for x in (key, value)
    ]
    found = [
        rule.compressor.compress(Partitions(*pairs, rule.top_k, first, start=start, rotary=rule.rotary))
        for first, start in ((0, 3), (5, 43))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_rows_of_a_batch_get_what_each_gets_alone(rule):
    tensors = drawn(rule, 60, batch=3)
    together = sparse_attention(*tensors, rule)
    alone = [sparse_attention(*(x[row : row + 1] for x in tensors), rule) for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_get_what_each_gets_alone(model, side):
    rows = [tokens(1, length, seed=length) for length in LENGTHS if length]
    starts = [COLUMNS - row.shape[1] if side == "left" else 0 for row in rows]
    ids, mask = torch.zeros(len(rows), COLUMNS, dtype=torch.long), torch.zeros(len(rows), COLUMNS, dtype=torch.long)
    for number, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[number, start : start + row.shape[1]] = row
        mask[number, start : start + row.shape[1]] = 1
    padded = model(ids, attention_mask=mask, use_cache=False).logits
    for found, start, row in zip(padded, starts, rows, strict=True):
        alone = model(row, use_cache=False).logits[0]
        torch.testing.assert_close(found[start : start + len(alone)], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_split_of_calls_is_the_parallel_pass(model, sizes):
    ids, cache, start, parts = tokens(2, sum(sizes)), LRSACache.of(model), 0, []
    for size in sizes:
        parts.append(model(ids[:, start : start + size], **cache_argument(model, cache)).logits)
        start += size
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


def test_partitions_are_compressed_alike_at_once_and_one_by_one(rule):
    query, key, value = (x.unflatten(2, (7, rule.lag_size)) for x in random_qkv(7 * rule.lag_size, batch=2))
    scores = torch.randn(*key.shape[:2], 6, rule.lag_size) if rule.compressor.takes_scores else None
    whole = key[:, :, :-1], value[:, :, :-1], key[:, :, 1:], value[:, :, 1:]
    queries = query.unflatten(1, (2, 2))[:, :, :, 1:, rule.lag_size - rule.compressor.window :]
    together = rule.compressor.compress(
        Partitions(*whole, rule.top_k, next_query=queries, rotary=rule.rotary, token_scores=scores)
    )
    for p in range(6):
        one = *(x[:, :, p : p + 1] for x in whole), rule.top_k, p, queries[:, :, :, p : p + 1]
        of_one = None if scores is None else scores[:, :, p : p + 1]
        alone = rule.compressor.compress(Partitions(*one, p * rule.lag_size, rule.rotary, of_one))
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[:, :, p : p + 1], expected)


def test_query_heads_share_what_their_key_head_keeps(rule):
    query, key, value = drawn(rule, 60, heads=2, group=3)
    grouped = sparse_attention(query, key, value, rule).unflatten(1, (2, 3))
    # Where queries choose, those of the whole group do.
    kept = select(key, value, rule, query=query) if rule.compressor.window else None
    for member in range(3):
        single = sparse_attention(query.unflatten(1, (2, 3))[:, :, member], key, value, rule, selection=kept)
        torch.testing.assert_close(grouped[:, :, member], single)


def test_gradients_are_those_of_the_output(rule):
    tensors = drawn(rule, 30, heads=1, group=1, dim=3, grad=True)
    if rule.compressor.plain is not rule.compressor:
        # Beyond that of the pairs that are kept, a gradient is the compressor's own invention.
        chosen = select(*tensors[1:], rule, query=tensors[0])
        assert torch.autograd.gradcheck(lambda *given: sparse_attention(*given, rule, selection=chosen), tensors)
        tensors = tensors[0], *(tensor.detach() for tensor in tensors[1:])
    assert torch.autograd.gradcheck(lambda *given: sparse_attention(*given, rule), tensors)


def test_without_kept_tokens_sinks_and_window_remain(rule):
    tensors, bare = drawn(rule, 60), rule.replace(top_k=0)
    expected = sparse_attention(*random_qkv(60), bare.replace(compressor=LagRelative()))
    torch.testing.assert_close(sparse_attention(*tensors, bare), expected)


def test_a_whole_partition_is_as_many_pairs_and_a_selector_drops_none(rule):
    tensors, whole = drawn(rule, 60), rule.replace(top_k=rule.lag_size)
    output = sparse_attention(*tensors, whole)
    assert output.isfinite().all()
    if isinstance(rule.compressor, Selector):
        dense = scaled_dot_product_attention(*random_qkv(60), is_causal=True, enable_gqa=True)
        torch.testing.assert_close(output, dense)


def test_it_survives_being_written_as_json(compressor, config):
    stored = json.loads(json.dumps(config.to_dict()))
    assert LRSAConfig.from_dict(stored) == config
    assert LRSAConfig.from_dict(stored).digest() == config.digest()
    assert hash(Compressor.from_dict(compressor.to_dict())) == hash(compressor)
    assert isinstance(compressor.for_layer(1), Compressor)


def test_compiled_it_is_the_same(rule):
    torch._dynamo.reset()
    tensors = drawn(rule, 60, grad=True)
    compiled = torch.compile(lambda *given: sparse_attention(*given, rule), backend="eager")
    outputs = compiled(*tensors), sparse_attention(*tensors, rule)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), tensors) for output in outputs))


def test_the_kernels_give_what_eager_pytorch_gives(rule):
    pytest.importorskip("triton")
    from ops.triton.oracle import assert_as_exact_as_eager, inputs

    query, key, *others = inputs(1, 2, 1, 45, 16)
    if rule.compressor.takes_scores:
        key = with_scores(key, torch.randn(key.shape[:3], device=key.device))
    assert_as_exact_as_eager([query, key, *others], rule)


def test_trained_exported_and_asked(compressor, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    settings = {
        "model": {"lrsa": {"compressor": compressor.to_dict()}, "lr_scheduler": None},
        "data": {"init_args": {"val": None, "limit": {"train": 1}}},
        "trainer": {"max_steps": 1, "enable_progress_bar": False},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", *DEBUG, *NO_LOGGER, "--validate_first", "false", "--config", "own.yaml"])
    main(["export", str(next(tmp_path.rglob("last.ckpt"))), "--out", "model"])
    stored = json.loads((tmp_path / "model/config.json").read_text())["lrsa"]
    assert LRSAConfig.from_dict(stored).compressor == compressor
    capfd.readouterr()
    main(["ask", "own.yaml", "What is it?", "--model", "model", "--max-new-tokens", "2", "--json"])
    answer = json.loads(capfd.readouterr().out)
    assert answer["tokens_kept"] < answer["tokens_seen"]
