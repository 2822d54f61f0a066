"""The store of runs: an SQLite file or a tracking server; errors become one-line UserErrors.

Heavy imports happen only when a store is opened, so every command can import this module.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lrsa_lit.errors import UserError, message_of, redacted
from lrsa_lit.paths import check_writable, shipped
from lrsa_lit.tracking import heartbeat
from lrsa_lit.uris import SQLITE, register, sqlite_path, sqlite_uri, with_user

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

URI = "tracking_uri"
"""The argument that names a store, for errors."""

EXPERIMENT = "lrsa"
"""The default experiment."""

MARKS = {
    # Without this kind, MLflow opens an experiment in its pages for GenAI, which do not list training runs.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": (
        "Runs of lrsa-lit: language models trained or evaluated with Lag-Relative Sparse Attention. `val/` and `test/` "
        "are scores under the run's own attention, `val/dense/` and so on those of the same weights under others. Each "
        "run's artifacts hold its config, pictures and answers."
    ),
}
"""Tags that every experiment gets unless it has them: MLflow's tags for its kind and its description."""

SERVER = ("http://", "https://")
_SQLITE_HEADER = b"SQLite format 3\0"
_TURN = 120
"""Seconds to wait for other processes that open the same file."""
_SCHEMES = (SQLITE, *SERVER, "postgresql", "mysql", "mssql", "databricks")
# By default, MLflow retries 7 times with growing pauses and a timeout of two minutes. Metrics are resent later anyway.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # These URLs would show user and password; a run's last lines name the store anyway.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def default_uri() -> str:
    """The store in cli.yaml, which the environment variable MLFLOW_TRACKING_URI overrides."""
    from omegaconf import OmegaConf

    register()
    return str(OmegaConf.load(shipped("cli.yaml")).trainer.logger.init_args.tracking_uri)


def checked_uri(uri: str, key: str = URI) -> str:
    """Check the URI of a store to write to, and return it with an absolute SQLite path, or with the user's name.

    Raises:
        UserError: it does not name a store, or names a file that is not an SQLite file or cannot be written.
    """
    if not uri.startswith(_SCHEMES):
        raise UserError(key, redacted(uri), "sqlite:///PATH, a database or a server's http(s):// address")
    if not uri.startswith(SQLITE):
        return with_user(uri)
    path = sqlite_path(uri, key)
    check_writable(key, uri, path.parent)
    if path.exists():
        try:
            with path.open("r+b") as file:
                header = file.read(len(_SQLITE_HEADER))
        except OSError as error:
            raise UserError(key, uri, reason=f"cannot be written ({error.strerror})") from None
        if header not in (b"", _SQLITE_HEADER):
            raise UserError(key, reason=f"{path} is not an SQLite file; name another one")
    return sqlite_uri(path, key)


def existing_uri(uri: str, key: str) -> str:
    """Like :func:`checked_uri`, for a store that must already exist and not be empty."""
    if uri.startswith(SQLITE):
        path = sqlite_path(uri, key)
        if not path.is_file() or not path.stat().st_size:
            what = "is empty" if path.is_file() else "does not exist"
            raise UserError(key, reason=f"{uri} {what} ({path}); name a store that `lrsa fit` has written")
    return checked_uri(uri, key)


def is_new(uri: str) -> bool:
    """Whether the URI is an SQLite store that does not exist yet."""
    return uri.startswith(SQLITE) and not sqlite_path(uri, URI).exists()


def artifact_location(uri: str) -> str | None:
    """The folder of artifacts, beside an SQLite store; None for a server, which decides itself."""
    return (sqlite_path(uri, URI).parent / "artifacts").as_uri() if uri.startswith(SQLITE) else None


def connect(uri: str, key: str = URI) -> MlflowClient:
    """Open a store, check that it answers, and mark its crashed runs as FAILED."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # MLflow logs each database error with a traceback before it raises it.
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)
    from mlflow.tracking import MlflowClient

    with answering(uri, key):
        with _one_at_a_time(uri, key):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        heartbeat.mark_dead(client)
    return client


def _one_at_a_time(uri: str, key: str) -> contextlib.AbstractContextManager[Any]:
    """A lock for opening an SQLite store: MLflow creates the tables of a new file without any locking.

    This also makes the folder of the file.
    """
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    import filelock

    path = sqlite_path(uri, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock is beside the store, so all processes that open it share the lock, whatever their caches are.
    return filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_TURN)


@contextlib.contextmanager
def answering(uri: str, key: str = URI) -> Iterator[None]:
    """Turn errors of a store in a block into a UserError: it does not answer, or refuses a request."""
    import alembic.util
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    # CommandError means a database of another version.
    of_databases = (sqlalchemy.exc.SQLAlchemyError, alembic.util.CommandError)
    try:
        yield
    except (MlflowException, requests.RequestException, *of_databases, OSError) as error:
        if refused(error):
            raise UserError(key, reason=f"{redacted(uri)} refuses this: {reason(error)}") from error
        advice = "start the server, or name another store" if uri.startswith(SERVER) else "name another store"
        raise UserError(key, reason=f"{redacted(uri)} does not answer ({reason(error)}); {advice}") from error


def refused(error: Exception) -> bool:
    """Whether a store understood a request and refused it; other errors may be temporary."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (400, 403, 404)


def reason(error: BaseException) -> str:
    """Why a store does not answer, without the wrapping messages of its libraries."""
    text = redacted(message_of(error))
    if cause := re.search(r"\[Errno -?\d+\] ([\w ]+)", text):
        return cause[1]
    return "timed out" if "timed out" in text else text[:160] or type(error).__name__


def experiment_id(client: MlflowClient, name: str | None, uri: str, named: str | None = None) -> str:
    """The id of an experiment, which is created if necessary and gets the :data:`MARKS` that it lacks.

    Args:
        client: client of the store.
        name: name of the experiment; None is ``lrsa`` or, with ``named``, any name.
        uri: the store's URI.
        named: id of an existing experiment, in place of the name.

    Raises:
        UserError: the experiment was deleted, there is none with this id, or it has another name.
    """
    found: Experiment | None
    if named is None:
        key, shown, found = "experiment_name", name or EXPERIMENT, client.get_experiment_by_name(name or EXPERIMENT)
        if found is None:
            return str(client.create_experiment(shown, artifact_location=artifact_location(uri), tags=MARKS))
    else:
        key, shown, found = "experiment_id", named, _found(client.get_experiment, named)
        if found is None:
            raise UserError(key, reason=f"{named} is not an experiment of {redacted(uri)}")
    if found.lifecycle_stage == "deleted":
        raise UserError(key, reason=f"{shown} was deleted in {redacted(uri)}; restore it or name another")
    if name not in (None, found.name):
        raise UserError(key, reason=f"{shown} is the experiment {found.name!r}, not {name!r}; name one of the two")
    mark(client, found)
    return str(found.experiment_id)


def mark(client: MlflowClient, experiment: Experiment) -> None:
    """Add the :data:`MARKS` that an experiment lacks; existing ones are not changed."""
    for name in MARKS.keys() - experiment.tags.keys():
        client.set_experiment_tag(experiment.experiment_id, name, MARKS[name])


def find_run(client: MlflowClient, run_id: str, uri: str, key: str) -> Run | None:
    """The run with an id; None if there is none. Raises a UserError if it was deleted."""
    run: Run | None = _found(client.get_run, run_id)
    if run is not None and run.info.lifecycle_stage == "deleted":
        restore = f"restore it with mlflow runs restore --run-id {run_id}, or start a new one without {key}"
        raise UserError(key, reason=f"the run {run_id} was deleted in {redacted(uri)}; {restore}")
    return run


def find_experiment(client: MlflowClient, name: str, key: str) -> Experiment:
    """The experiment with a name; raises a UserError that lists the nearest names if there is none."""
    found = {experiment.name: experiment for experiment in client.search_experiments()}
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=3, cutoff=0.0)
        raise UserError(key, reason=f"{name} is not an experiment of this store; the nearest are {', '.join(nearest)}")
    return found[name]


def _found(get: Any, name: str) -> Any:
    """The object with an id in a store; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return get(name)
    except MlflowException as error:
        if not refused(error):
            raise
        return None
