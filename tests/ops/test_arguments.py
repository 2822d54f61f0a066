"""Arguments that do not fit together are told in one line that names the argument."""

import logging

import pytest
import torch
from helpers import random_qkv, refused

from lrsa_lit.ops.sparse_attention import Rule, api, select, sparse_attention

RULE = Rule(sink_size=2, lag_size=4, top_k=2)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def tensors(**sizes):
    """query (1, 4, 20, 5), key and value (1, 2, 20, 5) unless told otherwise."""
    return random_qkv(20, **sizes)


CASES = {
    "query-3d": (lambda q, k, v: (q[0], k, v), {}, ("query, key", ((4, 20, 5), (1, 2, 20, 5)))),
    "key-3d": (lambda q, k, v: (q, k[0], v[0]), {}, ("query, key", ((1, 4, 20, 5), (2, 20, 5)))),
    "value-shape": (lambda q, k, v: (q, k, v[:, :, 1:]), {}, ("value", (1, 2, 19, 5))),
    "value-3d": (lambda q, k, v: (q, k, v[0]), {}, ("value", (2, 20, 5))),
    "batch": (lambda q, k, v: (q.expand(2, -1, -1, -1), k, v), {}, ("key", (1, 2, 20, 5))),
    "head-dim": (lambda q, k, v: (q[..., 1:], k, v), {}, ("key", (1, 2, 20, 5))),
    "groups": (lambda q, k, v: (q[:, :3], k, v), {}, ("query", (1, 3, 20, 5))),
    "fewer-query-heads": (lambda q, k, v: (q[:, :1], k, v), {}, ("query", (1, 1, 20, 5))),
    "no-key-heads": (lambda q, k, v: (q, k[:, :0], v[:, :0]), {}, ("query", (1, 4, 20, 5))),
    "no-query-heads": (lambda q, k, v: (q[:, :0], k, v), {}, ("query", (1, 0, 20, 5))),
    "more-queries": (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), {}, ("query", (1, 4, 20, 5))),
    "no-queries": (lambda q, k, v: (q[:, :, :0], k, v), {}, ("query", (1, 4, 0, 5))),
    "no-tokens": (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), {}, ("query", (1, 4, 0, 5))),
    "mixed-dtype": (lambda q, k, v: (q, k.float(), v), {}, ("dtype", (torch.float64, torch.float32, torch.float64))),
    "integers": (lambda q, k, v: (q.int(), k.int(), v.int()), {}, ("dtype", (torch.int32, torch.int32, torch.int32))),
    "devices": (lambda q, k, v: (q, k.to("meta"), v.to("meta")), {}, ("device", "cpu, meta, meta")),
    "cu-start": (lambda q, k, v: (q, k, v), {"cu_seqlens": ints(1, 20)}, ("cu_seqlens", [1, 20])),
    "cu-end": (lambda q, k, v: (q, k, v), {"cu_seqlens": ints(0, 19)}, ("cu_seqlens", [0, 19])),
    "cu-beyond": (lambda q, k, v: (q, k, v), {"cu_seqlens": ints(0, 21)}, ("cu_seqlens", [0, 21])),
    "cu-decreasing": (lambda q, k, v: (q, k, v), {"cu_seqlens": ints(0, 9, 5, 20)}, ("cu_seqlens", [0, 9, 5, 20])),
    "cu-empty": (lambda q, k, v: (q, k, v), {"cu_seqlens": ints()}, ("cu_seqlens", [])),
    "cu-float": (
        lambda q, k, v: (q, k, v),
        {"cu_seqlens": torch.tensor([0.0, 20.0])},
        ("cu_seqlens", (torch.float32, 2)),
    ),
    "cu-2d": (lambda q, k, v: (q, k, v), {"cu_seqlens": ints(0, 20)[None]}, ("cu_seqlens", (torch.int32, 1, 2))),
    "cu-list": (lambda q, k, v: (q, k, v), {"cu_seqlens": [0, 20]}, ("cu_seqlens", "list")),
    "cu-batch": (
        lambda q, k, v: tuple(x.expand(2, -1, -1, -1) for x in (q, k, v)),
        {"cu_seqlens": ints(0, 20)},
        ("cu_seqlens", None),
    ),
    "cu-fewer-queries": (
        lambda q, k, v: (q[:, :, 1:], k, v),
        {"cu_seqlens": ints(0, 20)},
        ("cu_seqlens", None),
    ),
    "impl": (lambda q, k, v: (q, k, v), {"impl": "cuda"}, ("impl", "cuda")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_argument_is_named(case):
    change, options, (field, value) = CASES[case]
    with refused(field, value):
        sparse_attention(*change(*tensors()), RULE, **options)


@pytest.mark.parametrize("case", ["value-shape", "value-3d", "integers", "no-tokens", "cu-end", "cu-float", "cu-batch"])
def test_a_selection_checks_the_same(case):
    change, options, (field, _) = CASES[case]
    _, key, value = change(*tensors())
    with refused(field.replace("query, ", "")):
        select(key, value, RULE, **options)


def test_the_implementations_that_run_here_agree():
    auto = sparse_attention(*tensors(), RULE)
    assert sparse_attention(*tensors(), RULE, impl="auto").equal(auto)
    assert sparse_attention(*tensors(), RULE, impl="eager").equal(auto)


def test_auto_logs_its_choice_once(caplog):
    api._decide.cache_clear()
    with caplog.at_level(logging.INFO, logger=api.__name__):
        for _ in range(3):
            sparse_attention(*tensors(), RULE)
            sparse_attention(*tensors(), RULE, impl="eager")
    assert [record.getMessage() for record in caplog.records] == ["sparse_attention on cpu runs impl=eager"]
