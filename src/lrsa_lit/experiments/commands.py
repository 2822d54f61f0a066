"""The ``lrsa fit`` and ``lrsa test`` commands of a study's rows, and the files that they write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.experiments.study import Evaluation, Row, Settings, Study, digest

_CHECKPOINT_EVERY = 100
_OWN_ATTENTION = ("head_gates", "digests")
"""Parts of a model that decide its own attention, and take no dense layers."""
_COMMANDS = {"val": "validate", "test": "test"}


RECORD = "training.json"
"""Record of a finished training, in the folder of a row and seed."""

CHECKPOINT = "checkpoints/last.ckpt"
"""Last checkpoint of a training, in the same folder."""


def answers_of(evaluations: Sequence[Evaluation], folder: Path) -> Path:
    """The file of an evaluation's answers in a folder; a JSON file beside it describes the evaluation."""
    about = [(item.rule_digest, item.data_set, item.split, item.generates) for item in evaluations]
    return folder / digest(about) / "answers.jsonl"


def fit(
    study: Study, row: Row, seed: int, folder: Path, overlay: Settings, checkpoints: Mapping[str, str]
) -> list[str]:
    """The fit command of a row: no validation, a checkpoint every 100 steps, and a record of the training.

    ``checkpoints`` are the paths of the checkpoints of the rows that it needs, by row name.
    """
    checkpoint = folder / CHECKPOINT
    saving = {"every_n_train_steps": _CHECKPOINT_EVERY, "save_top_k": 0, "save_last": True, "save_on_exception": True}
    own: Settings = {
        "seed_everything": seed,
        "validate_first": False,
        "trainer": {
            "default_root_dir": str(folder.parent),
            "limit_val_batches": 0,
            "callbacks": [
                _part("checkpoints.SafeModelCheckpoint", dirpath=str(checkpoint.parent), **saving),
                _part("callbacks.TrainingRecord", path=str(folder / RECORD)),
                _part("tracking.Throughput"),
            ],
        },
    }
    resumed = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
    return ["fit", *study.arguments, *_files(folder, [*row.layers(checkpoints), own, overlay]), *resumed]


def evaluation(
    study: Study,
    row: Row,
    evaluations: Sequence[Evaluation],
    folder: Path,
    overlay: Settings,
    depth: int,
    workers: int = 1,
) -> list[str]:
    """The evaluation command of a row under several attentions, on one split, with ``workers`` processes per device.

    The run's own rule is the first of these attentions, so that no attention is evaluated in addition. If all are
    dense, it is a rule that leaves all ``depth`` layers of the model dense.
    """
    own = next((item for item in evaluations if item.rule is not None), None)
    first, answers = evaluations[0], answers_of(evaluations, folder)
    data = study.data_set(first.data_set)
    # A plain text needs the logits of the whole vocabulary at most positions, so batches are small.
    several = study.overlay.get("data", {}).get("init_args", {}).get("eval_batch_size", 8)
    batch = several if study.generates(first.data_set) else 1
    model: dict[str, Any] = {
        "train_attention": {},
        "train_top_k": None,
        # The weights are trained already, so no other row's checkpoint is needed.
        "objective": None,
        "start_from": None,
        # These are changes of the first attention's rule, which may have a system, so all settings are given.
        "evaluate": {item.name: item.rule and _whole(item.rule) for item in evaluations if item is not own},
        "generate_answers": first.generates,
    }
    if most := study.data_sets[first.data_set].get("max_new_tokens"):
        model["max_new_tokens"] = most
    if own is not None and own.rule is not None:
        model["lrsa"] = _whole(own.rule)
    elif not any(row.settings["model"].get(part) for part in _OWN_ATTENTION):
        model |= {"lrsa": _whole(LRSAConfig(dense_layers=tuple(range(depth)))), "evaluate": {}}
    precision = row.settings["trainer"].get("precision")
    if str(precision).startswith("bf16"):
        # Evaluation needs no float32 copy of the weights.
        model["backbone"], precision = {"dtype": "bfloat16"}, None
    trainer: dict[str, Any] = {
        "default_root_dir": str(folder.parent),
        "precision": precision,
        "callbacks": [_part("callbacks.AnswerWriter", path=str(answers))],
    }
    if first.generates:
        trainer["callbacks"].append(_part("analysis.survival.EvidenceSurvival"))
    if workers > 1:
        trainer["strategy"] = _part("strategies.SharedDevice", processes=workers)
    data["init_args"] = data["init_args"] | {"eval_batch_size": batch}
    trained = row.layers(dict.fromkeys((other.name for other in row.needs), ""))
    without_data = ({**layer, "data": {}} for layer in trained)
    layers = [*without_data, {"trainer": trainer, "model": model, "data": data}, overlay]
    for path in (answers, answers.with_name(answers.name + ".partial")):
        # They may come from a stopped command or from other weights.
        path.unlink(missing_ok=True)
    checkpoint = folder / CHECKPOINT if row.steps else row.checkpoint
    weights = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    return [_COMMANDS[first.split], *study.arguments, *_files(answers.parent, layers), *weights]


def _whole(rule: LRSAConfig) -> Settings:
    """All settings of a rule, so that they override any others."""
    return {"system": None, "head_top_k": None, "latents": False, **rule.to_dict()}


def _part(name: str, **arguments: Any) -> Settings:
    return {"class_path": f"lrsa_lit.{name}", "init_args": arguments}


def _files(folder: Path, layers: Sequence[Settings]) -> list[str]:
    """Write each layer of settings to a file, and return the ``--config`` options, later ones overriding earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    options = []
    for number, layer in enumerate(layers):
        path = folder / f"settings-{number}.yaml"
        # JSON is also YAML.
        path.write_text(json.dumps({key: value for key, value in layer.items() if value}), encoding="utf-8")
        options += ["--config", str(path)]
    return options
