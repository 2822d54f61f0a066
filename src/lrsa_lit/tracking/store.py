"""Where runs are recorded: an SQLite file or a tracking server, opened with what goes wrong told in one line.

Imports nothing heavy before a store is opened, so that every command can use it.
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
"""The experiment of runs for which none is named."""

MARKS = {
    # Without a kind MLflow opens an experiment in its pages for GenAI, which list no training runs.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": (
        "Runs of lrsa-lit: language models trained or evaluated with Lag-Relative Sparse Attention. `val/` and `test/` "
        "are scores under the run's own attention, `val/dense/` and so on those of the same weights under others. Each "
        "run's artifacts hold its config, pictures and answers."
    ),
}
"""Tags of an experiment that has not got them yet: MLflow's names for what kind it is, and its description."""

SERVER = ("http://", "https://")
_SQLITE_HEADER = b"SQLite format 3\0"
_TURN = 120
"""Seconds to wait for others that open the same file."""
_SCHEMES = (SQLITE, *SERVER, "postgresql", "mysql", "mssql", "databricks")
# MLflow's own defaults try 7 times with growing pauses, two minutes each. Metrics are kept and sent again anyway.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # They would show a user and password, and the last lines of a run name it anyway.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def default_uri() -> str:
    """The store that cli.yaml names; it lets the environment variable MLFLOW_TRACKING_URI name another."""
    from omegaconf import OmegaConf

    register()
    return str(OmegaConf.load(shipped("cli.yaml")).trainer.logger.init_args.tracking_uri)


def checked_uri(uri: str, key: str = URI) -> str:
    """The URI of a store to write to, with an absolute SQLite path, or with the user's name.

    A UserError if it names no store, or a file that is no SQLite file or cannot be written.
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
            raise UserError(key, reason=f"{path} is no SQLite file; name another one")
    return sqlite_uri(path, key)


def existing_uri(uri: str, key: str) -> str:
    """As :func:`checked_uri`, for a store that must be there already and hold something."""
    if uri.startswith(SQLITE):
        path = sqlite_path(uri, key)
        if not path.is_file() or not path.stat().st_size:
            what = "is empty" if path.is_file() else "does not exist"
            raise UserError(key, reason=f"{uri} {what} ({path}); name a store that `lrsa fit` has written")
    return checked_uri(uri, key)


def is_new(uri: str) -> bool:
    """Whether it is an SQLite store that opening would make."""
    return uri.startswith(SQLITE) and not sqlite_path(uri, URI).exists()


def artifact_location(uri: str) -> str | None:
    """Artifacts stand beside an SQLite store; a server decides by itself."""
    return (sqlite_path(uri, URI).parent / "artifacts").as_uri() if uri.startswith(SQLITE) else None


def connect(uri: str, key: str = URI) -> MlflowClient:
    """Open a store, asking it something, and mark the runs in it that died without a word."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # It logs each failure with a traceback before it raises it.
    logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)
    from mlflow.tracking import MlflowClient

    with answering(uri, key):
        with _one_at_a_time(uri, key):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        heartbeat.mark_dead(client)
    return client


def _one_at_a_time(uri: str, key: str) -> contextlib.AbstractContextManager[Any]:
    """MLflow makes the tables of a new SQLite file without asking whether another process is about to.

    The folder of the file is made.
    """
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    import filelock

    path = sqlite_path(uri, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file: so others who write there wait as well, whatever their caches are.
    return filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_TURN)


@contextlib.contextmanager
def answering(uri: str, key: str = URI) -> Iterator[None]:
    """Make a UserError of what a store does within the block: it does not answer, or refuses."""
    import alembic.util
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    # CommandError: a database of another version.
    of_databases = (sqlalchemy.exc.SQLAlchemyError, alembic.util.CommandError)
    try:
        yield
    except (MlflowException, requests.RequestException, *of_databases, OSError) as error:
        if refused(error):
            raise UserError(key, reason=f"{redacted(uri)} refuses this: {reason(error)}") from error
        advice = "start the server, or name another store" if uri.startswith(SERVER) else "name another store"
        raise UserError(key, reason=f"{redacted(uri)} does not answer ({reason(error)}); {advice}") from error


def refused(error: Exception) -> bool:
    """Whether a store understood what it was asked and does not want it; anything else may pass."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (400, 403, 404)


def reason(error: BaseException) -> str:
    """Why a store does not answer, without the layers that its libraries wrap it in."""
    text = redacted(message_of(error))
    if cause := re.search(r"\[Errno -?\d+\] ([\w ]+)", text):
        return cause[1]
    return "timed out" if "timed out" in text else text[:160] or type(error).__name__


def experiment_id(client: MlflowClient, name: str | None, uri: str, named: str | None = None) -> str:
    """The id of an experiment, which is made if need be.

    It is called by its name (None stands for ``lrsa``), or by the id of one that exists, with its name or None. It
    gets the :data:`MARKS` that it lacks. A UserError if it was deleted, there is none of that id, or it has another
    name.
    """
    found: Experiment | None
    if named is None:
        key, shown, found = "experiment_name", name or EXPERIMENT, client.get_experiment_by_name(name or EXPERIMENT)
        if found is None:
            return str(client.create_experiment(shown, artifact_location=artifact_location(uri), tags=MARKS))
    else:
        key, shown, found = "experiment_id", named, _found(client.get_experiment, named)
        if found is None:
            raise UserError(key, reason=f"{named} is no experiment of {redacted(uri)}")
    if found.lifecycle_stage == "deleted":
        raise UserError(key, reason=f"{shown} was deleted in {redacted(uri)}; restore it or name another")
    if name not in (None, found.name):
        raise UserError(key, reason=f"{shown} is the experiment {found.name!r}, not {name!r}; name one of the two")
    mark(client, found)
    return str(found.experiment_id)


def mark(client: MlflowClient, experiment: Experiment) -> None:
    """Give an experiment the :data:`MARKS` that it lacks; those that somebody has changed stay."""
    for name in MARKS.keys() - experiment.tags.keys():
        client.set_experiment_tag(experiment.experiment_id, name, MARKS[name])


def find_run(client: MlflowClient, run_id: str, uri: str, key: str) -> Run | None:
    """The run of that id; None where the store has none. A UserError if it was deleted."""
    run: Run | None = _found(client.get_run, run_id)
    if run is not None and run.info.lifecycle_stage == "deleted":
        restore = f"restore it with mlflow runs restore --run-id {run_id}, or start a new one without {key}"
        raise UserError(key, reason=f"the run {run_id} was deleted in {redacted(uri)}; {restore}")
    return run


def find_experiment(client: MlflowClient, name: str, key: str) -> Experiment:
    """The experiment of that name; a UserError with the nearest names where there is none."""
    found = {experiment.name: experiment for experiment in client.search_experiments()}
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=3, cutoff=0.0)
        raise UserError(key, reason=f"{name} is no experiment of this store; the nearest are {', '.join(nearest)}")
    return found[name]


def _found(get: Any, name: str) -> Any:
    """What a store has of that id; None where it has none."""
    from mlflow.exceptions import MlflowException

    try:
        return get(name)
    except MlflowException as error:
        if not refused(error):
            raise
        return None
