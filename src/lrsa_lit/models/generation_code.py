"""The ``custom_generate`` folder of a model, by which transformers' ``generate`` decodes with the model's rule."""

from __future__ import annotations

from pathlib import Path

FOLDER = "custom_generate"
INSTALL = "it is on no package registry: `pip install` its wheel, or `pip install .` in its repository"
"""How others install this package: text for messages and model cards."""

_CODE = f'''\
"""Decodes under the rule in config.json, from a compressed cache (Lag-Relative Sparse Attention)."""


def generate(*inputs, model, **arguments):
    """As ``model.generate``; everything is done by the package lrsa-lit."""
    try:
        from lrsa_lit.attention import generate_under_rule
    except ImportError:
        needs = "decoding under this model's rule needs the package lrsa-lit"
        raise ImportError(f"{{needs}} ({INSTALL})") from None
    return generate_under_rule(model, *inputs, **arguments)
'''


def write_generation_code(folder: Path) -> None:
    """Write ``custom_generate/generate.py``, which transformers runs only with ``trust_remote_code=True``."""
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "generate.py").write_text(_CODE, encoding="utf-8")
