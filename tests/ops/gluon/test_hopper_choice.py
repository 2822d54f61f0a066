"""Which calls go to the Hopper kernels, and that the log says once if only Triton's version keeps them away."""

import importlib
import logging

import pytest
import torch

from lrsa_lit.ops.sparse_attention.gluon import hopper
from lrsa_lit.ops.sparse_attention.triton.host_functions import triton_is_among

FITTING = torch.zeros(1, 2, 32, hopper.DIM, dtype=torch.float16)


@pytest.fixture(autouse=True)
def small_calls_on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "ENOUGH", 64)
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    hopper._let_in.cache_clear()


def choice(tensor, caplog, calls=1):
    """Whether the kernels are chosen, and the warnings."""
    with caplog.at_level(logging.WARNING):
        chosen = [hopper.suits(tensor, tensor) for _ in range(calls)]
    assert len(set(chosen)) == 1
    return chosen[0], [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("installed", "state"),
    [("9.8.7", "is not known to compile them"), ("3.8.0", "compiles them, but no GPU has run them with it")],
)
def test_another_triton_is_named_once_with_the_one_that_has_the_kernels(installed, state, monkeypatch, caplog):
    monkeypatch.setattr(hopper, "CHECKED", False)
    monkeypatch.setattr(hopper.triton, "__version__", installed)
    chosen, warnings = choice(FITTING, caplog, calls=3)
    assert not chosen
    (warning,) = warnings
    assert "have run with triton 3.6 and 3.9 alone (torch 2.11 has 3.6); " in warning
    assert warning.endswith(f"triton {installed}, which is installed, {state}")


def test_the_installed_triton_has_what_the_kernels_name():
    assert set(hopper.RAN_WITH) <= set(hopper.COMPILES_WITH)
    assert triton_is_among(hopper.COMPILES_WITH), "benchmarks/hopper_compile.py tells whether it compiles them"
    for name in ("forward_pipeline", "query_gradient_pipeline", "key_gradient_pipeline"):
        importlib.import_module(f"lrsa_lit.ops.sparse_attention.gluon.{name}")


def test_nothing_is_said_where_the_kernels_run(monkeypatch, caplog):
    monkeypatch.setattr(hopper, "CHECKED", True)
    assert choice(FITTING, caplog) == (True, [])


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [FITTING[..., :64].clone(), FITTING.float(), FITTING[:, :, :31].clone(), FITTING[..., :1].expand(-1, -1, -1, 128)],
    ids=["head size", "dtype", "few rows", "strides"],
)
def test_nothing_is_said_of_calls_that_run_the_plain_kernels_anyway(tensor, checked, monkeypatch, caplog):
    monkeypatch.setattr(hopper, "CHECKED", checked)
    assert choice(tensor, caplog) == (False, [])


@pytest.mark.parametrize(
    ("tensor", "named"), [(FITTING[..., :64].clone(), "head size of 128; this one is 64"), (FITTING.float(), "float32")]
)
def test_what_no_other_triton_would_mend_is_told_without_a_warning(tensor, named, monkeypatch, caplog):
    monkeypatch.setattr(hopper, "CHECKED", False)
    with caplog.at_level(logging.INFO):
        assert not any(hopper.suits(tensor, tensor) for _ in range(3))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert named in record.getMessage()


def test_nothing_is_said_on_another_device(monkeypatch, caplog):
    monkeypatch.setattr(hopper, "CHECKED", False)
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: False)
    assert choice(FITTING, caplog) == (False, [])


def test_the_cpu_is_no_hopper_gpu(monkeypatch):
    monkeypatch.undo()
    assert not hopper._is_hopper(torch.device("cpu"))
    assert "compute capability 9.0" in hopper.refusal(torch.device("cpu"), torch.float16, hopper.DIM)
