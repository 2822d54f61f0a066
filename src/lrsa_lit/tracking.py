"""Runs in MLflow: an SQLite store without a server, and with each run what is needed to repeat it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger

from lrsa_lit.errors import UserError
from lrsa_lit.paths import check_writable

_SQLITE = "sqlite:///"
_SQLITE_HEADER = b"SQLite format 3\0"
_SCHEMES = (_SQLITE, "http://", "https://", "postgresql", "mysql", "mssql", "databricks")
_PACKAGES = ("lrsa-lit", "torch", "lightning", "transformers", "triton", "datasets", "peft", "mlflow")
_MAX_PARAM = 250


class MLflowRun(MLFlowLogger):
    """One MLflow run. Metrics are grouped by their prefix (train/, val/, test/).

    Args:
        experiment_name: runs of one experiment are compared with each other.
        run_name: name of the run; null derives one from model, lag size, K and seed.
        tracking_uri: sqlite:///PATH for a store without a server (the folder is made), or a server's http:// address.
        run_id: continue this run instead of a new one.
        tags: further tags.
    """

    def __init__(
        self,
        experiment_name: str = "lrsa",
        run_name: str | None = None,
        tracking_uri: str = "sqlite:///runs/mlflow.db",
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise UserError("trainer.logger: mlflow is not installed; install it, or run with --trainer.logger=false")
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=_checked_uri(tracking_uri),
            artifact_location=_artifact_location(tracking_uri),
            run_id=run_id,
            tags=dict(tags or {}),
            # Every checkpoint would be copied and never deleted.
            log_model=False,
            # Metrics are sent by a thread: about 20x cheaper for the step.
            synchronous=False,
        )

    @property
    def tracking_uri(self) -> str:
        """Where the runs are recorded."""
        return str(self._tracking_uri)

    @property
    def experiment_name(self) -> str:
        """Name of the experiment; Lightning's ``name`` is its id."""
        return str(self._experiment_name)

    def reopen(self) -> None:
        """Mark the run as running again: a validation before the fit closed it."""
        self.experiment.update_run(self.run_id, status="RUNNING")

    @property
    def named(self) -> bool:
        """Whether the user named the run."""
        return self._run_name is not None


class RecordConfig(SaveConfigCallback):
    """Put the resolved config, its values as params, and the run's circumstances as tags into the MLflow run.

    ``lrsa fit --config config.yaml`` with the recorded file repeats the run. Without a logger it does nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on the first process, before the run's first stage."""
        logger = trainer.logger
        if not isinstance(logger, MLflowRun):
            return
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False, format="yaml")
        values = yaml.safe_load(text)
        client, run_id = logger.experiment, logger.run_id
        if not logger.named:
            client.update_run(run_id, name=run_name(values))
        client.log_text(run_id, text, "config.yaml")
        logger.log_hyperparams(flatten({key: values[key] for key in ("model", "data", "trainer") if values.get(key)}))
        for name, value in circumstances(values, trainer).items():
            client.set_tag(run_id, name, value)


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested config values under dotted keys, without the ``class_path``/``init_args`` wrapping, cut as MLflow does.

    Logger and callbacks are left out: they say how a run is watched, not what it does, and config.yaml has them.
    """
    key = prefix.rstrip(".")
    if key in ("trainer.logger", "trainer.callbacks"):
        return {}
    if not isinstance(values, Mapping) or not values:
        return {key: str(values)[:_MAX_PARAM]}
    if "class_path" in values:
        return {
            key: str(values["class_path"]),
            **(flatten(values["init_args"], prefix) if values.get("init_args") else {}),
        }
    parts = [flatten(value, f"{prefix}{name}.") for name, value in values.items()]
    return {name: value for part in parts for name, value in part.items()}


def run_name(values: Mapping[str, Any]) -> str:
    """A readable name such as ``SmolLM2-135M-Instruct-L128-K32-s0``."""
    model = values["model"]
    backbone = model["backbone"].get("init_args", model["backbone"])["source"]
    stem = backbone.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
    trained = "" if model.get("train_attention") is not None else "-dense"
    return f"{stem}{trained}-L{model['lrsa']['lag_size']}-K{model['lrsa']['top_k']}-s{values['seed_everything']}"


def circumstances(values: Mapping[str, Any], trainer: Trainer) -> dict[str, str]:
    """Tags that say under which code, versions, seed and device the run was made."""
    tags = {
        "seed": str(values.get("seed_everything")),
        "device": str(trainer.strategy.root_device),
        "python": platform.python_version(),
        "data": getattr(trainer.datamodule, "fingerprint", ""),  # type: ignore[attr-defined]
        **_git(),
    }
    return tags | {f"version.{name}": version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, str]:
    """Commit of the code and whether it was changed since; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A virtual environment inside somebody's checkout must not report that project's commit.
        git("ls-files", "--error-unmatch", str(Path(__file__)))
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _checked_uri(uri: str) -> str:
    """The URI with an absolute SQLite path whose folder exists."""
    key = "trainer.logger.init_args.tracking_uri"
    if not uri.startswith(_SCHEMES):
        raise UserError(
            f"{key}: {uri!r} is not allowed; it must be sqlite:///PATH, a database or a server's http(s):// address"
        )
    if not uri.startswith(_SQLITE):
        return uri
    path = Path(uri.removeprefix(_SQLITE)).absolute()
    check_writable(key, uri, path.parent)
    try:
        header = _first_bytes(path, len(_SQLITE_HEADER)) if path.exists() else b""
    except OSError as error:
        raise UserError(f"{key}: {uri} cannot be read ({error.strerror})") from None
    if header not in (b"", _SQLITE_HEADER):
        raise UserError(f"{key}: {path} is no SQLite file; name another one")
    return f"{_SQLITE}{path}"


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _artifact_location(uri: str) -> str | None:
    """Artifacts beside an SQLite store; a server decides by itself."""
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).absolute().parent / "artifacts").as_uri()
