"""The record of a run with which it can be repeated, compared and resumed."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lrsa_lit.checkpoints.resume import RUN, about
from lrsa_lit.checkpoints.stop import Terminated
from lrsa_lit.data.filters.filter_measures import metrics_of
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import redacted
from lrsa_lit.io import write_atomically
from lrsa_lit.lightning_internals import number_logged_steps
from lrsa_lit.models.flops import kv_ratio
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking.artifacts import others_of, run_folder
from lrsa_lit.tracking.logger import MLflowRun, mlflow_run, run_of
from lrsa_lit.tracking.machine import git, versions
from lrsa_lit.tracking.params import beside_defaults, flatten
from lrsa_lit.yaml_file import dumped_settings

_PACKAGES = ("lrsa-lit", "torch", "lightning", "transformers", "triton", "datasets", "peft", "mlflow")
_CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}
_QUANTISATION = re.compile(r"[.-](?:I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)
_PARAMETER_COUNT = re.compile(r"[-_]\d+(?:\.\d+)?[MB](?=[-_]|$).*", re.IGNORECASE)
_VARIANT = re.compile(r"[-_](?:instruct|chat|it|hf|base)$", re.IGNORECASE)


class RecordConfig(SaveConfigCallback):
    """Log the resolved config, its values as params, the data sets and the run's circumstances to the MLflow run.

    ``lrsa fit --config config.yaml`` with the logged file repeats the run. The run's id is stored in checkpoints, so a
    resumed fit continues its run. Other loggers get the params. Without MLflow, the config is written to the run's
    folder; without any logger, it is not written.

    Args:
        args: see SaveConfigCallback.
        command: the command: fit, validate, test or predict.
        kwargs: see SaveConfigCallback.
    """

    def __init__(self, *args: Any, command: str = "fit", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"save_to_log_dir": False})
        self.command = command
        self._recorded_splits: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the config once, and the data of each stage when it is opened."""
        if (run := mlflow_run(trainer)) is not None and stage == "fit":
            run.keep_under(Path(trainer.default_root_dir))
        super().setup(trainer, pl_module, stage)
        logger, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, QADataModule):
            return
        opened = [split for split in data.report if split not in self._recorded_splits]
        self._recorded_splits.update(opened)
        for split in opened:
            if found := metrics_of(data.report[split], split):
                for each in trainer.loggers:
                    each.log_metrics(found, step=trainer.global_step)
        if logger is None:
            return
        with logger.answering():
            for split in opened:
                logger.experiment.log_inputs(logger.run_id, [_dataset_input(data, split)])

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the config and params; called once, on the first process, before the run's first stage."""
        logger, others = run_of(trainer), others_of(trainer)
        if logger is None and not others:
            return
        text = redacted(
            self.parser.dump(_repeatable(self.config), skip_none=False, skip_link_targets=False, format="yaml")
        )
        values = dumped_settings(text)
        parts = {key: values[key] for key in ("model", "data", "trainer") if values.get(key)}
        ratio = _kv_ratio(trainer, pl_module)
        for other in others:
            other.log_hyperparams(beside_defaults(parts) | ratio)
        if logger is None:
            write_atomically(run_folder(trainer) / "config.yaml", lambda file: file.write(text.encode()))
            return
        from mlflow.entities import RunTag

        with logger.answering():
            client, run_id = logger.experiment, logger.run_id
            if not logger.named and not logger.continues:
                client.update_run(run_id, name=run_name(values, self.command))
            client.log_text(run_id, text, "config.resumed.yaml" if logger.continues else "config.yaml")
            _log_params(logger, beside_defaults(parts) | ratio, flatten(parts) | ratio)
            tags = {"rule": rule_name(values["model"])} | circumstances(values, trainer)
            tags |= _evaluated(values, self.command)
            client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Number the steps of a resumed fit without a gap: Lightning counts a batch interrupted by Ctrl-C as done."""
        number_logged_steps(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the run's id in the checkpoint."""
        if (run := mlflow_run(trainer)) is not None:
            checkpoint[RUN] = run.run_id

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Mark a stopped run, to distinguish it from a failed one."""
        if (run := mlflow_run(trainer)) is not None and isinstance(exception, KeyboardInterrupt | Terminated):
            run.stopped = True


def _log_params(logger: MLflowRun, shown: Mapping[str, str], all_params: Mapping[str, str]) -> None:
    """Log params; MLflow does not allow changes in a continued run, so changed params become tags."""
    known = logger.experiment.get_run(logger.run_id).data.params if logger.continues else {}
    logger.log_hyperparams({name: value for name, value in shown.items() if name not in known})
    for name in known.keys() & all_params.keys():
        if known[name] != all_params[name]:
            logger.experiment.set_tag(logger.run_id, f"override.{name}", all_params[name])


def _kv_ratio(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """The share of dense attention's query-key pairs that the run's rule attends to.

    It is computed for a sequence of ``max_tokens``, over all layers, including dense ones. This single number makes
    runs with different lag size, K, number of sinks or chunk length comparable.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, LongContextQA) or not isinstance(data, QADataModule):
        return {}
    layers = module.backbone.config.num_hidden_layers
    return {"kv_ratio": f"{kv_ratio(module.lrsa, data.max_tokens, layers):.4f}"}


def _dataset_input(data: QADataModule, split: str) -> Any:
    """A split as an MLflow dataset input, with its name, the fingerprint as digest, and the counts of its report."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, _, digest = data.fingerprint.rpartition("-")
    dataset = Dataset(
        # MLflow keeps one data set per name and digest, so the name includes the split.
        name=f"{name} {split}",
        digest=digest,
        source_type="lrsa_lit",
        source=json.dumps(data.sources(), sort_keys=True),
        profile=json.dumps(dict(data.report[split]), sort_keys=True),  # type: ignore[index]
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", _CONTEXTS[split])])


def _repeatable(config: Any) -> Any:
    """The config without the id of a continued run, because repeating it should make a new run."""
    logger = config.get("trainer.logger")
    if not getattr(logger, "get", lambda name: None)("init_args.run_id"):
        return config
    copy = config.clone()
    copy["trainer.logger.init_args.run_id"] = None
    return copy


def _evaluated(values: Mapping[str, Any], command: str) -> dict[str, str]:
    """Tags with the command and, for an evaluation, the ``checkpoint`` and the run that wrote it."""
    checkpoint = values.get("ckpt_path")
    if command == "fit" or not checkpoint:
        return {"command": command}
    writer = about(Path(checkpoint)).run
    return {"command": command, "checkpoint": str(checkpoint)} | ({"checkpoint.run": writer} if writer else {})


def run_name(values: Mapping[str, Any], command: str = "fit") -> str:
    """A readable name: ``smollm2-L128-K32-s0``, or ``test-smollm2-L128-K32-s0@last`` for an evaluation."""
    model = values["model"]
    source = model["backbone"].get("init_args", model["backbone"])["source"]
    trained = "-dense" if model.get("train_attention", {}) is None else ""
    name = f"{family(source)}{trained}-{rule_name(model)}-s{values['seed_everything']}"
    if command == "fit":
        return name
    checkpoint = values.get("ckpt_path")
    return f"{command}-{name}" + (f"@{Path(checkpoint).stem}" if checkpoint else "")


def rule_name(model: Mapping[str, Any]) -> str:
    """A short name for a model's compression: ``L128-K32``, the name of a system, or ``encoder`` without a rule."""
    if model.get("lrsa") is None:
        return "encoder"
    if model.get("head_gates") is not None:
        return "gates"
    if (spectra := model.get("spectra")) is not None:
        return f"soco{spectra['init_args']['ratio']:g}-{rule_name({**model, 'spectra': None})}"
    if (digests := model.get("digests")) is not None:
        return f"digests-{digests['init_args']['count']}-of-{digests['init_args']['chunk']}"
    of_heads, system = (model["lrsa"].get(name) for name in ("head_top_k", "system"))
    if system is not None:
        return str(system["class_path"].rpartition(".")[2])
    return f"L{model['lrsa']['lag_size']}-K{model['lrsa']['top_k'] if of_heads is None else 'heads'}"


def family(source: str) -> str:
    """The model family in a backbone's source, in lower case: the part before size, variant and quantisation."""
    stem = source.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    stem = _QUANTISATION.sub("", stem)
    return _VARIANT.sub("", _PARAMETER_COUNT.sub("", stem) or stem).lower()


def circumstances(values: Mapping[str, Any], trainer: Trainer) -> dict[str, str]:
    """Tags with the code version, library versions, seed, device and data of the run."""
    tags = {
        "seed": str(values.get("seed_everything")),
        "device": str(trainer.strategy.root_device),
        "python": platform.python_version(),
        "data": getattr(trainer.datamodule, "fingerprint", ""),  # type: ignore[attr-defined]
    }
    if (commit := git("rev-parse", "HEAD")) is not None:
        # New files count only inside the package: a link to a virtual environment or a disk for runs does not matter.
        changed = git("status", "--porcelain", "--untracked-files=no")
        new = git("ls-files", "--others", "--exclude-standard", "--", "..")
        tags |= {"git_commit": commit, "git_dirty": str(bool(changed or new)).lower()}
    return tags | {f"version.{name}": version for name, version in versions(*_PACKAGES).items() if version}
