"""The commands of a study: what ``lrsa fit`` and ``lrsa test`` are told for a row, and where they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrsa_lit.experiments.settings import Settings, digest
from lrsa_lit.experiments.study import Evaluation, Row, Study
from lrsa_lit.io import write_atomically

ATTENTIONS_AT_ONCE = 8
"""Most attentions of one command: what it has found is lost where it is stopped."""

_CHECKPOINT_EVERY = 100
_SHARED = "lrsa_lit.strategies.SharedDevice"
_COMMANDS = {"val": "validate", "test": "test"}


@dataclass(frozen=True)
class Place:
    """Where the commands of a row and seed write.

    Attributes:
        root: folder of all rows, where a local store of MLflow stands too.
        name: what tells the row, its seed and its data from others.
    """

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """The row's own."""
        return self.root / self.name

    @property
    def record(self) -> Path:
        """What the training was, once it is over."""
        return self.folder / "training.json"

    @property
    def checkpoint(self) -> Path:
        """The last one of the training."""
        return self.folder / "checkpoints" / "last.ckpt"

    def answers(self, evaluations: Sequence[Evaluation]) -> Path:
        """The answers of an evaluation; what was evaluated stands beside them."""
        about = [(item.rule_digest, item.data_set, item.split, item.generates) for item in evaluations]
        return self.folder / digest(about) / "answers.jsonl"


def fit(study: Study, row: Row, seed: int, place: Place, overlay: Settings) -> list[str]:
    """The fit of a row: no validations, a checkpoint now and then, and a record of the training."""
    own: Settings = {
        "seed_everything": seed,
        "validate_first": False,
        "trainer": {
            "default_root_dir": str(place.root),
            "limit_val_batches": 0,
            "callbacks": [
                {
                    "class_path": "lrsa_lit.checkpoints.SafeModelCheckpoint",
                    "init_args": {
                        "dirpath": str(place.checkpoint.parent),
                        "every_n_train_steps": _CHECKPOINT_EVERY,
                        "save_top_k": 0,
                        "save_last": True,
                        "save_on_exception": True,
                    },
                },
                {"class_path": "lrsa_lit.callbacks.TrainingRecord", "init_args": {"path": str(place.record)}},
                {"class_path": "lrsa_lit.tracking.Throughput"},
            ],
        },
    }
    resumed = ["--ckpt_path", str(place.checkpoint)] if place.checkpoint.exists() else []
    layers = [study.overlay, row.overlay, own, overlay]
    return ["fit", *study.arguments, *_files(place.folder, layers), *resumed]


def evaluation(
    study: Study, row: Row, evaluations: Sequence[Evaluation], place: Place, overlay: Settings, workers: int = 1
) -> list[str]:
    """The evaluation of a row under several attentions, on one data set and split, by some processes on each device.

    The rule of the run itself is the first of theirs, so that none is evaluated that nobody asks for.
    """
    ruled = [item for item in evaluations if item.rule is not None]
    own, others = (ruled[0], [item for item in evaluations if item is not ruled[0]]) if ruled else (None, evaluations)
    first, answers = evaluations[0], place.answers(evaluations)
    data = study.data_set(first.data_set)
    # A text of which most is scored needs a logit for each word at most positions.
    most = study.overlay.get("data", {}).get("init_args", {}).get("eval_batch_size", 8)
    batch = most if study.generates(first.data_set) else 1
    model: dict[str, Any] = {
        "train_attention": {},
        "train_top_k": None,
        "evaluate": {item.name: None if item.rule is None else item.rule.to_dict() for item in others},
        "generate_answers": first.generates,
    }
    precision = row.settings["trainer"].get("precision")
    if str(precision).startswith("bf16"):
        # The weights alone: there is nothing to add up in float32.
        model["backbone"], precision = {"dtype": "bfloat16"}, None
    settings: Settings = {
        "trainer": {
            "default_root_dir": str(place.root),
            "precision": precision,
            "callbacks": [
                {"class_path": "lrsa_lit.callbacks.AnswerWriter", "init_args": {"path": str(answers)}},
                *([{"class_path": "lrsa_lit.analysis.survival.EvidenceSurvival"}] if first.generates else []),
            ],
            **({"strategy": {"class_path": _SHARED, "init_args": {"processes": workers}}} if workers > 1 else {}),
        },
        "model": model if own is None or own.rule is None else {**model, "lrsa": own.rule.to_dict()},
        "data": {**data, "init_args": {**data["init_args"], "eval_batch_size": batch}},
    }
    layers = [*({**layer, "data": {}} for layer in (study.overlay, row.overlay)), settings, overlay]
    checkpoint = ["--ckpt_path", str(place.checkpoint)] if row.steps else []
    for path in (answers, answers.with_name(answers.name + ".partial")):
        # Of a command that was stopped, or of other weights.
        path.unlink(missing_ok=True)
    command = _COMMANDS[first.split]
    return [command, *study.arguments, *_files(answers.parent, layers), *checkpoint]


def _files(folder: Path, layers: Sequence[Settings]) -> list[str]:
    """The options that give settings over settings to a command, each from a file of its own."""
    options = []
    for number, layer in enumerate(layers):
        path = folder / f"settings-{number}.yaml"
        _write(path, {key: value for key, value in layer.items() if value})
        options += ["--config", str(path)]
    return options


def _write(path: Path, settings: Settings) -> None:
    """JSON is YAML, too."""
    write_atomically(path, lambda file: file.write(json.dumps(settings).encode()))
