"""The passes of a training step: which attention each has, what is compiled for it, what is left of it."""

import functools
import gc
import weakref

import lightning
import pytest
import torch
from objective_helpers import EXAMPLES, RULE, fit, padded
from objectives.test_steps import ALL
from torch._dynamo.utils import counters

from lrsa_lit.attention import interface
from lrsa_lit.data.collate import collate_packed
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.objectives import Distillation, HiddenAlignment, Sum
from lrsa_lit.objectives.teachers import Loaded, OwnDense
from lrsa_lit.tasks import AnnealedTopK, SampledTopK


@pytest.mark.parametrize(
    ("schedule", "compiled"),
    [
        (SampledTopK([4, 16]), False),
        (AnnealedTopK(steps=3), False),
        pytest.param(SampledTopK([4, 16]), True, marks=pytest.mark.slow),
    ],
    ids=["sampled", "annealed", "compiled"],
)
def test_the_model_alone_is_recomputed_and_under_its_rule(schedule, compiled, monkeypatch):
    """Compiled layers, which have K as a tensor, are compiled in the first step alone."""
    attended, graphs, sparse, dense = [], [], interface.sparse_attention, interface._dense

    def as_sparse(*args, rule, **kwargs):
        assert torch.is_grad_enabled()
        attended.append(rule.top_k)
        return sparse(*args, rule=rule, **kwargs)

    def as_dense(*args, **kwargs):
        assert not torch.is_grad_enabled()
        attended.append("dense")
        return dense(*args, **kwargs)

    monkeypatch.setattr(interface, "sparse_attention", as_sparse)
    if compiled:
        # What is dense is a part of the graph.
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        torch._dynamo.reset()
    else:
        monkeypatch.setattr(interface, "_dense", as_dense)
    count = lightning.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: graphs.append(counters["stats"]["unique_graphs"])
    )
    batches = [padded(EXAMPLES[:2]) for _ in range(5)]
    fit(batches, ALL, in_step=1, schedule=schedule, options={"callbacks": [count]}, compile_layers=compiled,
        gradient_checkpointing=True)  # fmt: skip
    drawn = [schedule(3, step, RULE) for step in range(5)]
    teacher = [] if compiled else ["dense"] * 2
    assert attended == [each for top_k in drawn for each in (*teacher, *[top_k] * 4)], "two layers, each twice"
    assert len(set(drawn)) > 1
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("kind", [OwnDense, Loaded])
def test_nothing_of_a_teachers_pass_is_kept_for_the_backward_pass(kind, monkeypatch, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found, run, before, after = [], kind.run, [], []

    def watched(*args):
        made = run(*args)
        found.extend(map(weakref.ref, (made, made.hidden, *made.layers.values())))
        return made

    monkeypatch.setattr(kind, "run", watched)
    watch = lightning.pytorch.callbacks.LambdaCallback(
        on_before_backward=lambda *_: before.append([each() is not None for each in found]),
        on_train_batch_end=lambda *_: after.append([each() is not None for each in found]),
    )
    teacher = "self" if kind is OwnDense else str(tmp_path)
    objective = Sum([Distillation(teacher, positions=30), HiddenAlignment()])
    gc.disable()
    try:
        fit([padded(EXAMPLES[:2]), collate_packed(EXAMPLES[2:])], objective, in_step=1, options={"callbacks": [watch]})
    finally:
        gc.enable()
    assert found
    assert not any(map(any, before + after))
