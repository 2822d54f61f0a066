"""Compiled layers: one graph for all layers and rules where it can be, and the numbers of eager ones everywhere."""

import copy
import functools
import itertools

import pytest
import torch
from torch import distributed
from torch._dynamo.utils import counters

from lrsa_lit.attention import LAYOUT, LRSACache, LRSAConfig, enable, observing, packed_layout, using
from lrsa_lit.attention.layout import Layout
from lrsa_lit.context_parallel import SharedRows, Shares
from lrsa_lit.models import Backbone
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.ops.sparse_attention import RandomTokens, StraightThrough, TokenGate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULE = LRSAConfig(sink_size=4, lag_size=16, top_k=4)


class Small(Backbone):
    """Two query heads and one of keys: the interpreter of the kernels is slow."""

    def _load(self):
        return tiny_model(hidden_size=32, num_heads=2, num_kv_heads=1)


@pytest.fixture
def build(monkeypatch):
    """Two equal models, eager and with compiled layers."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()

    def make(**options):
        models = Small("tiny").build(), Small("tiny", compile_layers=True, **options).build()
        return tuple(model.to(DEVICE) for model in models)

    return make


@pytest.fixture
def models(build):
    return build()


def graphs():
    return counters["stats"]["unique_graphs"]


def breaks():
    return sum(counters["graph_break"].values())


def tokens(batch, length):
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def train(model, ids, rule=None, impl="triton", **inputs):
    """Logits and gradients, under a rule that stays."""
    if rule is not None:
        enable(model, rule, impl=impl)
    model.zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits
    logits.float().square().mean().backward()
    return [logits, *(weight.grad.clone() for weight in model.parameters())]


def assert_same(models, ids, rule=None, **inputs):
    expected, got = (train(model, ids, rule, **inputs) for model in models)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_one_graph_serves_all_layers_and_rules(models):
    ids = tokens(1, 40)
    for rule in (RULE, RULE.replace(top_k=9, value_weight=0)):
        assert_same(models, ids, rule)
    assert (graphs(), breaks()) == (1, 0)
    # Dense layers, whichever they are, are a second graph.
    for layers in ([0], [0, 1]):
        assert_same(models, ids, RULE.replace(dense_layers=layers))
    assert (graphs(), breaks()) == (2, 0)


def test_packed_rows(models):
    ids = tokens(1, 42)
    for boundaries in ([0, 5, 42], [0, 2, 5, 42]):
        positions = torch.cat([torch.arange(b - a, device=DEVICE) for a, b in itertools.pairwise(boundaries)])[None]
        assert_same(models, ids, RULE, position_ids=positions, **{LAYOUT: packed_layout(boundaries)})
    # Two sequences, any number.
    assert (graphs(), breaks()) == (2, 0)


def test_checkpointed_layers(build):
    assert_same(build(gradient_checkpointing=True), tokens(1, 40), RULE)
    assert (graphs(), breaks()) == (1, 0)


def test_rows_that_devices_share(build):
    """A layer stops for what devices exchange."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        shared = SharedRows(Shares.cut((0, 70), 1, RULE.rule), distributed.group.WORLD)
        layout = {LAYOUT: Layout(shared=shared), "position_ids": shared.positions(torch.device(DEVICE))}
        assert_same(build(gradient_checkpointing=True), tokens(1, 70), RULE, **layout)
    finally:
        distributed.destroy_process_group()
    assert breaks() > 0


def test_mixed_precision(models):
    with torch.autocast(DEVICE, dtype=torch.float16):
        expected, got = (train(model, tokens(1, 40), RULE) for model in models)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)
    assert (graphs(), breaks()) == (1, 0)


def test_many_forms_of_a_layer_stay_compiled(monkeypatch):
    """Each with and without gradient: two rows, two longer ones, one; so it is with dense layers under a rule."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = Small("tiny", compile_layers=True).build()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for training in (True, False):
            model.train(training)
            for ids in (tokens(2, 40), tokens(2, 44), tokens(1, 40)):
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        model(ids.cpu(), use_cache=False)
    assert graphs() > 8


def test_pads_in_a_mask_interrupt_the_graph(models):
    mask = torch.ones(2, 40, dtype=torch.int64, device=DEVICE)
    mask[0, :2] = 0
    mask[1, 31:] = 0
    assert_same(models, tokens(2, 40), RULE, attention_mask=mask)
    assert breaks() > 0


@pytest.mark.parametrize(
    ("rule", "impl"),
    [
        (RULE.replace(compressor=RandomTokens()), "triton"),
        pytest.param(RULE.replace(compressor=StraightThrough()), "triton", marks=pytest.mark.slow),
        (RULE.replace(compressor=TokenGate()), "eager"),
        (RULE, "eager"),
    ],
    ids=["other compressor", "gradient to the choice", "gates", "eager"],
)
def test_what_cannot_be_traced_interrupts_the_graph(rule, impl, models):
    assert_same(models, tokens(1, 40), rule, impl=impl)
    assert breaks() > 0


def test_an_evaluation_in_between_compiles_nothing(models):
    _, model = models
    ids = tokens(1, 40)
    train(model, ids, RULE)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), using(model, RULE.replace(top_k=2)):
        model.generate(ids, past_key_values=LRSACache.of(model), max_new_tokens=3, do_sample=False)
    assert_same((enable(models[0], RULE, impl="triton"), model), ids)
    assert (graphs(), breaks()) == (1, 0)


def test_an_observer_sees_every_layer(models):
    seen = []
    _, model = models
    enable(model, RULE, impl="triton")
    with observing(model, lambda rule, layout, query, key, value: seen.append(rule.layer)):
        model(tokens(1, 40), use_cache=False)
    assert seen == [0, 1]


def test_a_copy_runs_its_own_layers(models):
    _, model = models
    enable(model, RULE, impl="triton")
    ids = tokens(1, 40)
    copied = copy.deepcopy(model)
    before = model(ids, use_cache=False).logits
    assert copied(ids, use_cache=False).logits.equal(before)
    for weight in copied.model.layers.parameters():
        torch.nn.init.zeros_(weight)
    assert model(ids, use_cache=False).logits.equal(before)
    assert not copied(ids, use_cache=False).logits.equal(before)


def test_one_more_graph_serves_all_layers_whose_heads_differ_in_k(build, monkeypatch):
    monkeypatch.setattr(Small, "_load", lambda self: tiny_model(hidden_size=32, num_heads=2, num_kv_heads=2))
    rule = LRSAConfig(sink_size=2, lag_size=8, top_k=3, head_top_k=[[3, 8], [0, 5]])
    with torch.no_grad():
        eager, compiled = (enable(model, rule, impl="triton")(tokens(1, 20), use_cache=False) for model in build())
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=1e-4, atol=1e-6)
    assert (graphs(), breaks()) == (1, 0)
