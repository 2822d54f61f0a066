"""A study of a tiny model over token files of a few short questions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lrsa_lit.data.prompts import encode
from lrsa_lit.data.records import Passage, QARecord
from lrsa_lit.models.tiny import tiny_tokenizer
from lrsa_lit.study import tokens
from lrsa_lit.study.plan import Study
from lrsa_lit.study.runner import Runner

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
    "bars": {
        "at 4x": {"set": "plain", "kept": 0.25, "of_dense": 0.5},
        "dense": {"set": "plain", "row": ["dense"], "inference": "dense", "at_least": 0.9},
        "pays": {
            "set": "plain",
            "row": "lrsa",
            "inference": "4x",
            "above": [["dense", "4x"], ["dense", "8x"]],
            "p": 0.01,
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


def write_data(folder: Path) -> Path:
    """Token files of the study."""
    for name, split, count in (("plain", "train", 5), ("plain", "test", 3), ("text", "test", 2)):
        tokens.write(tokens.path_of(folder, name, split), examples(split, count))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def run_study(study_file: Path, data: Path, folder: Path, parts: tuple[str, ...] = ("main", "all")) -> Path:
    """The results of some parts."""
    for part in parts:
        Runner(Study(str(study_file)), data, folder / "results.jsonl", folder / "work", 1e6).run(part)
    return folder / "results.jsonl"


@pytest.fixture
def results(study_file, data, tmp_path) -> Path:
    return run_study(study_file, data, tmp_path)


@pytest.fixture
def study_file(tmp_path) -> Path:
    path = tmp_path / "tiny-study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path


def without_times(lines: list) -> list:
    """Lines of results without what differs from run to run."""
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds")} for line in lines
    ]
