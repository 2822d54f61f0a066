"""The count of operations, against numbers worked out by hand and against a counter that watches a model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.models import Backbone
from lrsa_lit.models.backbone import LoRA
from lrsa_lit.models.flops import Shape, kv_ratio, peak_flops, training_flops
from lrsa_lit.models.tiny import tiny_model

# S=1, L=2, K=1: the first partition is compressed at position 5, the second at 7.
RULE = LRSAConfig(sink_size=1, lag_size=2, top_k=1)
# Visible to each of 8 queries: 1 2 3 4 5, then S + K + raw: 1+1+3, 1+1+4, then 1+2+3.
PAIRS = 1 + 2 + 3 + 4 + 5 + 5 + 6 + 6
SMALL = Shape(layers=2, query_heads=3, head_dim=4, linear=100, trained=100, head=50, head_trained=50)


def test_by_hand():
    linear, head = 3 * 2 * 100 * 8, 3 * 2 * 50 * 5
    assert training_flops(SMALL, [8], 5, RULE) == linear + head + 3 * 2 * 4 * 3 * 4 * PAIRS
    assert training_flops(SMALL, [8], 5, None) == linear + head + 3 * 2 * 4 * 3 * 4 * 36


def test_a_dense_layer_counts_all_its_pairs():
    rule = RULE.replace(dense_layers=[1])
    difference = training_flops(SMALL, [8], 5, rule) - training_flops(SMALL, [8], 5, RULE)
    assert difference == 3 * 4 * 3 * 4 * (36 - PAIRS)


def test_sequences_do_not_see_each_other():
    assert training_flops(SMALL, [8, 3], 0, RULE) == training_flops(SMALL, [8], 0, RULE) + training_flops(
        SMALL, [3], 0, RULE
    )


def test_frozen_weights_have_no_gradient_of_their_own():
    adapters = SMALL._replace(trained=10, head_trained=0)
    saved = training_flops(SMALL, [8], 5, None) - training_flops(adapters, [8], 5, None)
    assert saved == 2 * 90 * 8 + 2 * 50 * 5


def test_kv_ratio_by_hand():
    assert kv_ratio(RULE, 8, 2) == PAIRS / 36
    assert kv_ratio(RULE.replace(dense_layers=[0]), 8, 4) == (36 + 3 * PAIRS) / (4 * 36)
    assert kv_ratio(RULE, 5, 2) == 1.0
    assert kv_ratio(RULE.replace(top_k=2), 8, 2) == 1.0
    assert kv_ratio(LRSAConfig(lag_size=128, top_k=32), 1_000_000, 30) == pytest.approx(32 / 128, abs=1e-3)


def test_heads_of_different_k_count_their_own_pairs():
    # K = 1 gives PAIRS, K = L = 2 gives 36.
    none = kv_ratio(RULE.replace(top_k=0), 8, 1) * 36
    ragged = RULE.replace(head_top_k=[[0, 2], 1, [0, 1]])
    assert kv_ratio(ragged, 8, 3) == pytest.approx(((none + 36) / 2 + PAIRS + (none + PAIRS) / 2) / (3 * 36))
    model = SMALL._replace(layers=3, query_heads=4, linear=0, trained=0)
    head = model._replace(layers=1, query_heads=2)
    of_each = sum(training_flops(head, [8, 3], 0, RULE.replace(top_k=top_k)) for top_k in (0, 2, 1, 1, 0, 1))
    assert training_flops(model, [8, 3], 0, ragged) == of_each
    dense = ragged.replace(dense_layers=(0, 2))
    assert kv_ratio(dense, 8, 3) == pytest.approx((2 * 36 + PAIRS) / (3 * 36))


def test_the_forward_pass_agrees_with_a_counter():
    """PyTorch's counter sees every product of the dense model; it counts masked pairs as well, so T^2."""
    model, length = tiny_model().eval(), 24
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], use_cache=False)
    # Some versions of transformers make the rotary angles by a product.
    angles = sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if "rotary" in name)
    shape = Shape.of(model)
    norms = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    matrices = shape._replace(linear=shape.linear - norms, trained=shape.trained - norms)
    masked = shape.layers * 4 * shape.query_heads * shape.head_dim * length * (length - 1) // 2
    assert counter.get_total_flops() - angles == training_flops(matrices, [length], length, None) // 3 + masked


def test_shape_of_a_model_with_adapters():
    full, adapted = Backbone("tiny").build(), Backbone("tiny", lora=LoRA(rank=4)).build()
    base, shape = Shape.of(full), Shape.of(adapted)
    added = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert base.trained == base.linear
    assert (shape.linear, shape.trained) == (base.linear + added, added)
    assert (shape.head, shape.head_trained) == (base.head, 0)
    assert base.head == base.head_trained == 259 * 64
    assert (base.layers, base.query_heads, base.head_dim) == (2, 4, 16)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_peaks(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
