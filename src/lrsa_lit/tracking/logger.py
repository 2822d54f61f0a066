"""A Lightning logger that records one MLflow run."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import re
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lrsa_lit.errors import UserError, redacted
from lrsa_lit.io import write_atomically
from lrsa_lit.run_labels import WORKLOAD
from lrsa_lit.tracking import heartbeat
from lrsa_lit.tracking.delivery import Delivery
from lrsa_lit.tracking.store import EXPERIMENT, answering, checked_uri, connect, experiment_id, find_run, is_new

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}
_FLUSH_SECONDS = 15.0
"""Seconds that the end of a run waits for a store that does not answer."""

_SAVE_SECONDS = 2.0
"""Seconds that a checkpoint waits for it."""

_log = logging.getLogger("lrsa_lit.tracking")


class MLflowRun(Logger):
    """One MLflow run. Metrics are grouped by their prefix (train/, val/, test/, perf/).

    The store must answer when the run starts. If it stops answering later, metrics are kept and sent late. A new SQLite
    store is created with its first run.

    Args:
        experiment_name: name of the experiment, whose runs are compared with each other; null is that of experiment_id,
            or else lrsa.
        run_name: name of the run; null derives one from command, model, lag size, K, seed and checkpoint.
        tracking_uri: sqlite:///PATH for a store without a server (the folder is created), or a server's http://
            address.
        run_id: id of a run to continue, in place of a new one.
        tags: further tags.
        experiment_id: id of an existing experiment.

    Attributes:
        tracking_uri: URI of the store, possibly with user and password, so it must not be shown.
        named: whether the user named the run.
        continues: whether the run was started by another process.
        stopped: whether the user stopped the run; set before the run ends.
    """

    def __init__(
        self,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tracking_uri: str = "sqlite:///runs/mlflow.db",
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        experiment_id: str | None = None,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("mlflow") is None:
            raise UserError("mlflow", reason="it is not installed; install it, or run without this logger")
        self.tracking_uri = checked_uri(tracking_uri)
        self.tags = dict(tags or {})
        self.named, self.continues = run_name is not None, run_id is not None
        self._experiment_name, self._experiment_id = experiment_name, experiment_id
        self._run_name, self._run_id = run_name, run_id
        self._initialized = self.stopped = False
        self._recorded: dict[str, int] = {}
        self._spool: Path | None = None
        if getattr(rank_zero_only, "rank", 0) == 0 and not is_new(self.tracking_uri):
            # Check now, before a model is loaded.
            with self.answering():
                self._check()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; the first access creates or continues the run."""
        if not self._initialized:
            with self.answering():
                self._open()
            self._initialized = True
        return self._client

    @property
    def store(self) -> str:
        """URI of the store without user and password, so it may be shown."""
        return redacted(self.tracking_uri)

    @property
    def version(self) -> str | None:
        """The id of the run, which is created if necessary; None on other processes than the first."""
        _ = self.experiment
        return self._run_id

    @property
    def name(self) -> str | None:
        """The id of the run's experiment; None on other processes than the first."""
        _ = self.experiment
        return self._experiment_id

    # Lightning calls these ids version and name.
    run_id, experiment_id = version, name

    @property
    def experiment_name(self) -> str:
        """Name of the experiment; Lightning's ``name`` is its id."""
        return str(self._experiment_name or EXPERIMENT)

    def folder(self, root: Path) -> Path:
        """The run's folder inside the trainer's; its checkpoints are also there."""
        return root / str(self.name) / str(self.version)

    def answering(self) -> AbstractContextManager[None]:
        """Turn the store's errors in a block into a UserError."""
        return answering(self.tracking_uri)

    def reopen(self) -> None:
        """Mark the run as RUNNING again, because a validation before the fit closed it."""
        if self._initialized:
            self.deliver("the status RUNNING", self.experiment.update_run, status="RUNNING")
            self._delivery.rest(False)

    def continue_run(self, run_id: str, step: int, same: bool = True) -> bool:
        """Continue the run that wrote a checkpoint after ``step`` optimizer steps; return whether it is continued.

        A new run is made if the run is in another store. It is also made if the run has recorded steps after the
        checkpoint and either finished, or would not be repeated identically (``same`` is false). In all other cases the
        run is continued, and values that it has recorded already are not recorded twice.

        Raises:
            UserError: the run was deleted, or the store does not answer.
        """
        if self._initialized or self._run_id is not None:
            return self.continues
        if is_new(self.tracking_uri):
            return False
        client = self._client
        with self.answering():
            run = find_run(client, run_id, self.tracking_uri, "ckpt_path")
            if run is None:
                # The run is in another store.
                return False
            # System metrics are not tied to steps, so they may be logged again; older runs call them system/.
            names = [name for name in run.data.metrics if not name.startswith((WORKLOAD, "system/"))]
            recorded = {name: max(each.step for each in client.get_metric_history(run_id, name)) for name in names}
        # A step is logged with the number of steps before it, so the first one after the checkpoint has ``step``.
        went_on = recorded.get("train/loss", -1) >= step
        if went_on and (run.info.status == "FINISHED" or not same):
            self.tags["resumed_from"] = run_id
            _log.info("Starting a new run, because %s continued after this checkpoint", run_id)
            return False
        self._run_id, self.continues, self._recorded = run_id, True, recorded
        return True

    def deliver(self, what: str, send: Callable[..., object], *args: Any, **options: Any) -> None:
        """Call a method of MLflow's client in the background, with the run's id and further arguments.

        ``what`` names the call in messages if it cannot be delivered.
        """
        self._delivery.call(what, functools.partial(send, self.run_id, *args, **options))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Record params."""
        from mlflow.entities import Param

        values = vars(params) if isinstance(params, Namespace) else params
        self.experiment.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in values.items()])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics; Lightning's ``epoch`` is logged only with training metrics, as ``train/epoch``."""
        from mlflow.entities import Metric

        now, values = int(time.time() * 1000), dict(metrics)
        epoch = values.pop("epoch", None)
        if epoch is not None and any(name.startswith("train/") for name in values):
            values["train/epoch"] = epoch
        # Remove characters that MLflow does not allow in names.
        named = {re.sub(r"[^\w/. -]", "", name): _short(float(value)) for name, value in values.items()}
        new = {name: value for name, value in named.items() if (step or 0) > self._recorded.get(name, -1)}
        self._delivery.metrics([Metric(name, value, now, step or 0) for name, value in new.items()])

    @rank_zero_only
    def save(self) -> None:
        """Send queued metrics before a checkpoint is saved; a store that does not answer gets them later."""
        if self._initialized:
            self._delivery.flush(_SAVE_SECONDS)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Send what is left and close the run; a warning lists what could not be sent."""
        if not self._initialized:
            return
        self._delivery.rest()
        status = "KILLED" if self.stopped else _STATUS.get(status, status)
        self.deliver(f"the status {status}", self.experiment.set_terminated, status, int(time.time() * 1000))
        lost = self._delivery.flush(_FLUSH_SECONDS)
        kept = self._keep_undelivered()
        if lost:
            where = "" if kept is None else f"; the metrics are in {kept} and will be sent when the run is resumed"
            _log.warning("Not delivered to %s, which does not answer: %s%s", self.store, ", ".join(lost), where)

    @rank_zero_only
    def keep_under(self, root: Path) -> None:
        """Set the file for undelivered metrics, in the run's folder; send the metrics that an earlier process left."""
        self._spool = self.folder(root) / "undelivered.jsonl"
        if not self.continues or not self._spool.is_file():
            return
        from mlflow.entities import Metric

        kept = [Metric(**json.loads(line)) for line in self._spool.read_text(encoding="utf-8").splitlines()]
        for metric in kept:
            self._recorded[metric.key] = max(metric.step, self._recorded.get(metric.key, -1))
        # The file is removed only after they are delivered.
        self._delivery.metrics(kept)
        _log.info("Sending %d metric values that an earlier process left in %s", len(kept), self._spool)

    def _keep_undelivered(self) -> Path | None:
        """Write undelivered metrics to a file, and return it; None if there are none or no folder is set."""
        if self._spool is None:
            return None
        text = "".join(json.dumps(dict(metric)) + "\n" for metric in self._delivery.undelivered())
        try:
            if text:
                # Overwriting loses nothing: undelivered metrics of earlier stages are still queued.
                write_atomically(self._spool, lambda file: file.write(text.encode()))
                return self._spool
            self._spool.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be written (%s)", self._spool, error.strerror)
        return None

    @functools.cached_property
    def _client(self) -> MlflowClient:
        """A separate client, because mlflow.set_tracking_uri would change the store of the whole process."""
        return connect(self.tracking_uri)

    @functools.cached_property
    def _delivery(self) -> Delivery:
        client, run_id = self.experiment, str(self.run_id)

        def send(metrics: Sequence[Any]) -> None:
            client.log_batch(run_id, metrics=metrics)

        return Delivery(send, lambda: heartbeat.beat(client, run_id), heartbeat.EVERY)

    def _check(self) -> Run | None:
        """Check that the run or experiment given by id exists, and return the run, if one was given."""
        client = self._client
        if self._run_id is not None:
            if (found := find_run(client, self._run_id, self.tracking_uri, "run_id")) is None:
                raise UserError("run_id", self._run_id, reason=f"is not a run of {self.store}")
            return found
        if self._experiment_id is not None:
            experiment_id(client, self._experiment_name, self.tracking_uri, self._experiment_id)
        return None

    def _open(self) -> None:
        from mlflow.tracking.context.registry import resolve_tags

        client = self._client
        if (run := self._check()) is not None:
            self._experiment_id = str(run.info.experiment_id)
            heartbeat.beat(client, run.info.run_id)
        else:
            named = self._experiment_name, self.tracking_uri, self._experiment_id
            self._experiment_id = experiment_id(client, *named)
            # resolve_tags adds tags from the environment: a sweep names the parent run in MLFLOW_RUN_CONTEXT.
            tags = resolve_tags(self.tags | heartbeat.tags())
            self._run_id = client.create_run(self._experiment_id, tags=tags, run_name=self._run_name).info.run_id
        self._experiment_name = client.get_experiment(self._experiment_id).name


def _short(value: float) -> float:
    """Round a non-integer to seven digits, the precision of float32."""
    return value if value.is_integer() else float(f"{value:.7g}")


def mlflow_run(trainer: Trainer) -> MLflowRun | None:
    """The MLflow run of a trainer, alone or among other loggers; None without one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, MLflowRun)), None)


def run_of(trainer: Trainer) -> MLflowRun | None:
    """The MLflow run of a trainer on its first process; None on other processes, and without MLflow."""
    return mlflow_run(trainer) if trainer.is_global_zero else None
