"""The description of an evaluation: the model, its attentions, and the questions."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.filters.filter_measures import context_measures, filtered_parts
from lrsa_lit.data.module import Split
from lrsa_lit.data.split_facts import SplitFacts
from lrsa_lit.models.flops import kv_ratio
from lrsa_lit.run_labels import OWN
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tasks.measures import MEASURES
from lrsa_lit.tracking.machine import describe


def facts(trainer: Trainer, task: LongContextQA) -> dict[str, Any]:
    """Everything that decides an evaluation's answers, as plain values.

    Returns:
        - ``machine``: the device, the commit and the versions of libraries;
        - ``command`` ("test" or "validate"), ``split`` ("test" or "val"), ``checkpoint`` (a path, or null);
        - ``model`` (its name), ``layers``, ``dtype`` of its weights, ``precision`` of the trainer;
        - ``generated``: whether answers were generated, or only losses computed; ``max_new_tokens``;
        - ``attentions``: for each name in the lines of answers, ``rule`` (null is dense) and ``rule_digest`` ("dense"
          for dense attention);
        - ``measured``: for each name, if answers were generated, the cost of the attention, by the names of
          :data:`~lrsa_lit.tasks.measures.MEASURES`;
        - ``filtered``: for each data set with a context filter, what the filter left, by the names of
          :data:`~lrsa_lit.data.filters.filter_measures.MEASURES`;
        - ``data_sets``: for each name in these lines ("" without a mixture), ``set_digest``, ``questions``, ``length``
          (mean tokens), ``contexts`` (the number of each question's context, in the order of the lines) and
          ``kv_share`` (for each attention, the share of key-value pairs that it attends to).
    """
    command = "validate" if trainer.state.fn == "validate" else "test"
    split: Split = "val" if command == "validate" else "test"
    layers, data = task.model.config.get_text_config().num_hidden_layers, getattr(trainer, "datamodule", None)
    # A rule for no layer is dense attention.
    rules = {
        name or OWN: None if rule is None or len(rule.dense_layers) == layers else rule
        for name, rule in task.attentions.items()
    }
    data_sets = {} if data is None else data.facts(split)
    report = {} if data is None else data.report[split]
    return {
        "machine": describe(),
        "command": command,
        "split": split,
        "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        "model": task.backbone.name,
        "layers": layers,
        "dtype": str(task.model.dtype).removeprefix("torch."),
        "precision": str(trainer.precision),
        "generated": task.generate_answers,
        "max_new_tokens": task.max_new_tokens,
        "attentions": {
            name: {"rule": rule and rule.to_dict(), "rule_digest": rule.digest() if rule else "dense"}
            for name, rule in rules.items()
        },
        "measured": {name: _measured(trainer, f"{split}/" if name == OWN else f"{split}/{name}/") for name in rules},
        "filtered": {part: context_measures(report, part) for part in filtered_parts(report)},
        "data_sets": {name: _about_questions(part, rules, layers) for name, part in data_sets.items()},
    }


def _measured(trainer: Trainer, stem: str) -> dict[str, Any]:
    values = {name: trainer.callback_metrics.get(f"{stem}{name}") for name in MEASURES}
    # JSON has no NaN, which is the time of a second token if no answer has one.
    return {name: float(value) for name, value in values.items() if value is not None and not value.isnan()}


def _about_questions(part: SplitFacts, rules: dict[str, LRSAConfig | None], layers: int) -> dict[str, Any]:
    shares = {name: 1.0 if rule is None else kv_ratio(rule, part.length, layers) for name, rule in rules.items()}
    return {
        "set_digest": part.digest,
        "questions": part.questions,
        "length": part.length,
        "kv_share": shares,
        "contexts": part.contexts,
    }
