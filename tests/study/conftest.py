"""A study of a tiny model over token files of a few short questions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lrsa_lit.data.prompts import encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.study import tokens

STUDY = {
    "seeds": [0, 1],
    "trainer": {"max_steps": 3},
    "model": {
        "backbone": {"source": "tiny"},
        "lrsa": {"sink_size": 2, "lag_size": 32, "top_k": 8},
        "max_new_tokens": 4,
    },
    "data": {
        "class_path": "lrsa_lit.data.Mixture",
        "init_args": {"max_tokens": 1024, "batch_size": 2, "weights": {"plain": 1.0}},
    },
    "data_sets": {
        "plain": {"class_path": "lrsa_lit.data.QAFiles"},
        "text": {"class_path": "lrsa_lit.data.QAFiles", "generate": False},
    },
    "inference": {
        "dense": None,
        "4x": {},
        "8x": {"top_k": 4},
        "random-4x": {"compressor": {"class_path": "lrsa_lit.ops.sparse_attention.RandomTokens"}},
    },
    "rows": {
        "base": {"trainer": {"max_steps": 0}},
        "dense": {"model": {"train_attention": None}},
        "lrsa": None,
        "mixed": {
            "model": {"train_top_k": {"class_path": "lrsa_lit.tasks.SampledTopK", "init_args": {"choices": [4, 8, 32]}}}
        },
    },
    "parts": {
        "main": {"rows": ["dense", "lrsa"], "seeds": [0], "inference": ["dense", "4x"], "sets": ["plain", "text"]},
        "all": {
            "rows": ["base", "mixed", "lrsa"],
            "inference": ["own", "random-4x"],
            "sets": ["plain"],
            "against": {"row": "lrsa", "inference": "own"},
        },
    },
}


def examples(split: str, count: int) -> list:
    tokenizer = tiny_tokenizer()
    return [
        encode(
            QARecord(
                f"{split}-{number}",
                tuple(Passage(f"T{place}", f"fact {number} {place} " * (3 + number)) for place in range(3)),
                "Which?",
                (f"a{number}", "b"),
                ("T1",),
            ),
            tokenizer,
            2048,
        )
        for number in range(count)
    ]


@pytest.fixture
def data(tmp_path) -> Path:
    for name, split, count in (("plain", "train", 5), ("plain", "test", 3), ("text", "test", 2)):
        tokens.write(tokens.path_of(tmp_path / "data", name, split), examples(split, count))
    return tmp_path / "data"


@pytest.fixture
def study_file(tmp_path) -> Path:
    path = tmp_path / "tiny-study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path
