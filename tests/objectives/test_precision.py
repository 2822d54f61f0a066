"""Objectives in mixed precision: near float64, and with the scaler that float16 needs."""

import copy

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from objective_helpers import BATCHES, EXAMPLES, RULE, assert_alike, fit, losses
from objectives.test_steps import ALL

from lrsa_lit.attention import enable
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.objectives import Distillation
from lrsa_lit.ops.sparse_attention import Recency

# Rounding does not change what is kept.
RECENT = RULE.replace(compressor=Recency())
ERRORS = {torch.bfloat16: 0.1, torch.float16: 0.02}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_losses_and_gradients_are_near_those_of_float64(dtype, batch):
    model = enable(tiny_model(), RECENT)
    exact = copy.deepcopy(model).double()
    weights = torch.tensor([term.weight for term in ALL.terms])
    with torch.autocast("cpu", dtype=dtype):
        found = losses(model, ALL, batch)
    expected = losses(exact, ALL, batch)
    torch.testing.assert_close(found.double(), expected, rtol=ERRORS[dtype] / 4, atol=0)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= ERRORS[dtype] * other.grad.norm()


def test_what_nothing_is_dropped_from_has_nothing_to_learn_from_itself():
    """Teacher and model make their logits alike, in the dtype of autocast."""
    model = enable(tiny_model(), RULE.replace(top_k=RULE.lag_size))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = losses(model, Distillation(positions=30), BATCHES["padded"](EXAMPLES))
    assert abs(found) < 1e-3


@pytest.mark.parametrize("teacher_dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_has_any_dtype(teacher_dtype, tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, batch = enable(tiny_model(), RECENT), BATCHES["packed"](EXAMPLES)
    expected = losses(model, Distillation(str(tmp_path), 30, teacher_dtype="float32"), batch)
    objective = Distillation(str(tmp_path), 30, teacher_dtype=teacher_dtype)
    for dtype in ERRORS:
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(losses(model, objective, batch), expected, rtol=0.02, atol=0)


def test_a_scaler_of_float16_trains_what_float32_does():
    expected, _ = fit([BATCHES["padded"](EXAMPLES)], ALL, rule=RECENT)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugins = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    found, _ = fit([BATCHES["padded"](EXAMPLES)], ALL, rule=RECENT, options=plugins)
    assert scaler.get_scale() == 256
    assert_alike(found, expected, tolerance=0.03)
