"""What kvpress keeps, recorded: the same prompts, scores and kept positions."""

import json
from pathlib import Path

import pytest
import torch

from lrsa_lit.systems import KeyNorm, Prompt, StreamingLLM
from lrsa_lit.systems.system import Place

VECTORS = Path(__file__).parents[1] / "vectors" / "systems"


def recorded(name):
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def prompt(key, value=None, query=None):
    """Of lists (H, T, D), and queries (H, G, w, D); a scale of 1 / 2 for D = 4."""
    key, value, query = (None if each is None else exact(each)[None] for each in (key, value, query))
    value, query = key if value is None else value, key[:, :, None, :0] if query is None else query
    return Prompt(key, value, query, 0.5, Place(0))


def test_key_norm():
    case = recorded("knorm")
    given, expected = prompt(case["inputs"]["k"]), case["expected"]
    torch.testing.assert_close(KeyNorm().scores(given)[0], exact(expected["scores"]), rtol=0, atol=1e-7)
    for removed in case["params"]["ratios"]:
        assert KeyNorm(1 - removed).keep(given)[0].tolist() == expected["kept"][str(removed)]


@pytest.mark.parametrize("case", recorded("streaming_llm")["expected"], ids=lambda case: f"T={case['tokens']}")
def test_streaming_llm(case):
    system = StreamingLLM(1 - case["removed"], sink_size=case["n_sink"])
    kept = system.keep(prompt(torch.zeros(2, case["tokens"], 4).tolist()))
    assert kept[0].tolist() == [case["kept"]] * 2


@pytest.mark.parametrize(("tokens", "removed", "kept"), recorded("streaming_llm")["n_kept"])
def test_counts(tokens, removed, kept):
    """A share whose product is a whole number keeps that many here; kvpress loses one to rounding: int(29.99…)."""
    wanted = round(tokens * (1 - removed), 9)
    assert KeyNorm(1 - removed).count(tokens) == (wanted if wanted == int(wanted) else kept)
