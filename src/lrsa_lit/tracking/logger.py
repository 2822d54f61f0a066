"""One MLflow run as a logger of Lightning."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from lrsa_lit import heartbeat
from lrsa_lit.errors import UserError
from lrsa_lit.store import answering, checked_uri, connect, experiment_id
from lrsa_lit.tracking.delivery import Delivery

_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}
_FLUSH_SECONDS = 15.0
"""How long the end of a run waits for a store that does not answer."""

_SAVE_SECONDS = 2.0
"""How long a checkpoint waits for it."""
_SPOOL = "undelivered.jsonl"
_BATCH = 1000
"""MLflow's limit for the metrics of one call."""

_log = logging.getLogger("lrsa_lit.tracking")


class MLflowRun(MLFlowLogger):
    """One MLflow run. Metrics are grouped by their prefix (train/, val/, test/, perf/).

    The store must answer when the run starts. If it stops answering later, metrics are kept and sent late.

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
        uri = checked_uri(tracking_uri)
        if getattr(rank_zero_only, "rank", 0) == 0:
            # Now, before a model is loaded.
            connect(uri)
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=uri,
            run_id=run_id,
            tags=dict(tags or {}),
            # Every checkpoint would be copied and never deleted.
            log_model=False,
            # Metrics go through Delivery instead, which bears a store that is gone.
            synchronous=True,
        )
        self.continues = run_id is not None
        self._recorded: dict[str, int] = {}
        self._user_stopped = False
        self._root: Path | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client, with the run made or taken up.

        Lightning's own would set MLFLOW_TRACKING_URI for the whole process, and with it the store of later runs.
        """
        if not self._initialized:
            with answering(self.tracking_uri):
                self._open()
            self._initialized = True
        return self._mlflow_client

    @property
    def tracking_uri(self) -> str:
        """Where the runs are recorded."""
        return str(self._tracking_uri)

    @property
    def experiment_name(self) -> str:
        """Name of the experiment; Lightning's ``name`` is its id."""
        return str(self._experiment_name)

    @property
    def named(self) -> bool:
        """Whether the user named the run."""
        return self._run_name is not None

    def reopen(self) -> None:
        """Mark the run as running again: a validation before the fit closed it."""
        if self._initialized:
            self._deliver_status("RUNNING")
            self._delivery.rest(False)

    def continue_run(self, run_id: str, step: int, same: bool = True) -> bool:
        """Take up the run that a checkpoint was written in.

        One that went on after the checkpoint is left as it is and a new one made if it came to its end, or if what
        follows will not be the same again. Otherwise it was killed: what it has recorded is not recorded twice. A run
        of another store becomes a new one.

        Args:
            run_id: the checkpoint's run.
            step: the checkpoint's optimizer steps.
            same: whether the settings are the run's.

        Returns:
            Whether the run is continued.
        """
        from mlflow.exceptions import MlflowException

        if self._initialized or self._run_id is not None:
            return self.continues
        client = self._mlflow_client
        try:
            run = client.get_run(run_id)
            recorded = {
                name: max(metric.step for metric in client.get_metric_history(run_id, name))
                for name in run.data.metrics
                if not name.startswith("system/")
            }
        except MlflowException:
            # Recorded in another store.
            return False
        # The first step after the checkpoint is logged under the number of those before it.
        went_on = recorded.get("train/loss", -1) >= step
        if went_on and (run.info.status == "FINISHED" or not same):
            self.tags = {**(self.tags or {}), "resumed_from": run_id}
            _log.info("A new run, as %s went on after this checkpoint", run_id)
            return False
        self._run_id, self.continues, self._recorded = run_id, True, recorded
        return True

    def stopped_by_user(self) -> None:
        """Say that the run is about to end because somebody stopped it."""
        self._user_stopped = True

    def deliver(self, what: str, send: Callable[[], object]) -> None:
        """Record something in the background; ``what`` names it if it cannot be delivered."""
        self._delivery.call(what, send)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics; Lightning's own ``epoch`` belongs to the training's."""
        from mlflow.entities import Metric

        now, values = int(time.time() * 1000), dict(metrics)
        epoch = values.pop("epoch", None)
        if epoch is not None and any(name.startswith("train/") for name in values):
            values["train/epoch"] = epoch
        # What MLflow allows in names.
        named = {re.sub(r"[^\w/. -]", "", name): float(value) for name, value in values.items()}
        new = {name: value for name, value in named.items() if (step or 0) > self._recorded.get(name, -1)}
        self._delivery.metrics([Metric(name, value, now, step or 0) for name, value in new.items()])

    @rank_zero_only
    def save(self) -> None:
        """Send what is queued, as a checkpoint is about to be saved; a store that does not answer gets it later."""
        if self._initialized:
            self._delivery.flush(_SAVE_SECONDS)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Send what is left and close the run; what could not be sent is said."""
        if not self._initialized:
            return
        self._delivery.rest()
        self._deliver_status("KILLED" if self._user_stopped else _STATUS.get(status, status))
        lost = self._delivery.flush(_FLUSH_SECONDS)
        kept = self._keep_undelivered()
        if lost:
            where = "" if kept is None else f"; the metrics stand in {kept} and are sent when the run is resumed"
            _log.warning("Not delivered to %s, which does not answer: %s%s", self.tracking_uri, ", ".join(lost), where)

    @rank_zero_only
    def keep_under(self, root: Path) -> None:
        """Say where metrics are kept that an ended run could not deliver, and send those of the time before.

        Args:
            root: the trainer's folder; the file stands beside the run's checkpoints.
        """
        self._root = root
        spool = self._spool()
        if not self.continues or not spool.is_file():
            return
        from mlflow.entities import Metric

        kept = [Metric(**json.loads(line)) for line in spool.read_text(encoding="utf-8").splitlines()]
        with answering(self.tracking_uri):
            for start in range(0, len(kept), _BATCH):
                self.experiment.log_batch(self.run_id, metrics=kept[start : start + _BATCH])
        spool.unlink()
        _log.info("%d metric values of the time before were sent from %s", len(kept), spool)

    def _spool(self) -> Path:
        """Beside the run's checkpoints."""
        assert self._root is not None
        return self._root / str(self.name) / str(self.version) / _SPOOL

    def _keep_undelivered(self) -> Path | None:
        """Write undelivered metrics to a file; None where there are none, or no place for them."""
        if self._root is None:
            return None
        metrics, spool = self._delivery.undelivered(), self._spool()
        if not metrics:
            # An earlier stage's, which have arrived since.
            spool.unlink(missing_ok=True)
            return None
        try:
            spool.parent.mkdir(parents=True, exist_ok=True)
            # Replaced: what an earlier stage could not deliver is still queued.
            spool.write_text("".join(json.dumps(dict(metric)) + "\n" for metric in metrics), encoding="utf-8")
        except OSError as error:
            _log.warning("%s cannot be written (%s)", spool, error.strerror)
            return None
        return spool

    @functools.cached_property
    def _delivery(self) -> Delivery:
        client, run_id = self.experiment, str(self.run_id)
        return Delivery(
            lambda metrics: client.log_batch(run_id, metrics=metrics),
            lambda: heartbeat.beat(client, run_id),
            heartbeat.EVERY,
        )

    def _deliver_status(self, status: str) -> None:
        client, run_id = self.experiment, self.run_id
        end = None if status == "RUNNING" else int(time.time() * 1000)

        def send() -> None:
            client.update_run(run_id, status=status) if end is None else client.set_terminated(run_id, status, end)

        self.deliver(f"the status {status}", send)

    def _open(self) -> None:
        """Make the run, or take up the one that was asked for."""
        from mlflow.tracking.context.registry import resolve_tags

        client = self._mlflow_client
        if self._run_id is not None:
            self._experiment_id = client.get_run(self._run_id).info.experiment_id
            self._experiment_name = client.get_experiment(self._experiment_id).name
            client.update_run(self._run_id, status="RUNNING")
            return
        self._experiment_id = experiment_id(client, self.experiment_name, self.tracking_uri)
        # With what the environment says: a sweep names the parent run in MLFLOW_RUN_CONTEXT.
        tags = resolve_tags({**(self.tags or {}), heartbeat.TAG: f"{time.time():.0f}"})
        self._run_id = client.create_run(self._experiment_id, tags=tags, run_name=self._run_name).info.run_id
