"""Results of the tiny study that are written by hand, so that their statistics are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import tiny_study

from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.study import DENSE, OWN, Study

QUESTIONS = 200


def study_of(folder: Path, **changes: Any) -> Study:
    """The tiny study with other settings."""
    return open_study(str(tiny_study.write(folder / "tiny-study.yaml", **changes)))


def evaluations(study: Study, *cells: Sequence[Any]) -> list[dict[str, Any]]:
    """Lines of (row, attention, share of right answers), and a seed where it is not 0."""
    return [evaluation(study, *cell[:2], scores(cell[2]), *cell[3:]) for cell in cells]


def evaluation(
    study: Study, row: str, attention: str, f1: Sequence[float], seed: int = 0, data_set: str = "plain", **more: Any
) -> dict[str, Any]:
    trained = study.row(row)
    rule = trained.rule if attention == OWN else study.inference[attention]
    return {
        "kind": "evaluation",
        "study": "tiny-study",
        "row": row,
        "config": trained.hash,
        "seed": seed,
        "train_digest": "train" if trained.steps else "",
        "weights": "weights" if trained.steps else "",
        "machine": {"device": "abacus", "commit": "c0ffee", "torch": "2.0"},
        "attention": attention,
        "rule_digest": DENSE if rule is None else rule.digest(),
        "rule": None if rule is None else rule.to_dict(),
        "layers": 2,
        "length": 256,
        "kv_share": 1.0 if rule is None else 0.5,
        "set": data_set,
        "split": "test",
        "set_digest": "questions",
        "questions": len(f1),
        "loss": [1.0] * len(f1),
        "tokens": [2] * len(f1),
        "f1": list(f1),
        "em": [int(score == 1) for score in f1],
        "recall": list(f1),
        "text": ["answer"] * len(f1),
        "survival": None,
        **more,
    }


def training(**more: Any) -> dict[str, Any]:
    """A training that no report is made of."""
    about = {"kind": "training", "study": "tiny-study", "row": "lrsa", "config": "a", "seed": 0, "train_digest": "d"}
    measured = {"loss_of_last_20_steps": 1.0, "tokens_per_second": None, "peak_memory_bytes": None}
    return about | {"weights": "w", "machine": {"device": "abacus"}, "steps": 3, **measured, "settings": {}, **more}


def scores(share: float, count: int = QUESTIONS) -> list[float]:
    """As many ones as asked, first of all: of two such lists the better one answers all that the other does."""
    return [1.0] * round(share * count) + [0.0] * (count - round(share * count))
