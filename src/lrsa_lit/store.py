"""Where runs are recorded: an SQLite file or a tracking server, opened with what goes wrong told in one line.

Imports nothing heavy before a store is opened, so that every command can use it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit import heartbeat
from lrsa_lit.errors import UserError, said
from lrsa_lit.paths import cache_dir, check_writable, shipped

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

URI_KEY = "trainer.logger.init_args.tracking_uri"
"""The setting of a run that names its store."""

SQLITE = "sqlite:///"
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
}


def default_uri() -> str:
    """The store that cli.yaml names; it lets the environment variable MLFLOW_TRACKING_URI name another."""
    from omegaconf import OmegaConf

    return str(OmegaConf.load(shipped("cli.yaml")).trainer.logger.init_args.tracking_uri)


def checked_uri(uri: str, key: str = URI_KEY) -> str:
    """The URI of a store to write to, with an absolute SQLite path whose folder is made.

    Raises:
        UserError: it names no store, or an SQLite file that is none or cannot be written.
    """
    if not uri.startswith(_SCHEMES):
        raise UserError(
            f"{key}: {uri!r} is not allowed; it must be sqlite:///PATH, a database or a server's http(s):// address"
        )
    if not uri.startswith(SQLITE):
        return uri
    path = sqlite_path(uri)
    check_writable(key, uri, path.parent)
    if path.exists():
        _check_sqlite(path, uri, key)
    return f"{SQLITE}{path}"


def existing_uri(uri: str, key: str) -> str:
    """As :func:`checked_uri`, for a store that must be there already.

    Raises:
        UserError: it is not, or it holds nothing.
    """
    if uri.startswith(SQLITE):
        path = sqlite_path(uri)
        if not path.is_file() or not path.stat().st_size:
            what = "is empty" if path.is_file() else "does not exist"
            raise UserError(f"{key}: {uri} {what} ({path}); name a store that `lrsa fit` has written")
    return checked_uri(uri, key)


def sqlite_path(uri: str) -> Path:
    """The absolute path of an SQLite store."""
    return Path(uri.removeprefix(SQLITE)).absolute()


def artifact_location(uri: str) -> str | None:
    """Artifacts stand beside an SQLite store; a server decides by itself."""
    return (sqlite_path(uri).parent / "artifacts").as_uri() if uri.startswith(SQLITE) else None


def connect(uri: str, key: str = URI_KEY) -> MlflowClient:
    """Open a store, asking it something, and mark the runs in it that died without a word.

    Raises:
        UserError: it does not answer.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    with answering(uri, key):
        with _one_at_a_time(uri):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        heartbeat.mark_dead(client)
    return client


def _one_at_a_time(uri: str) -> contextlib.AbstractContextManager[Any]:
    """MLflow makes the tables of a new SQLite file without asking whether another process is about to."""
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    import filelock

    name = hashlib.sha256(str(sqlite_path(uri)).encode()).hexdigest()[:16]
    folder = cache_dir("locks")
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / f"{name}.lock", timeout=_TURN)


@contextlib.contextmanager
def answering(uri: str, key: str = URI_KEY) -> Iterator[None]:
    """Turn a store's failures within the block into one line.

    Raises:
        UserError: the store did not answer, or refused.
    """
    import alembic.util
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    failures = (
        MlflowException,
        requests.RequestException,
        sqlalchemy.exc.SQLAlchemyError,
        # A database of another version.
        alembic.util.CommandError,
        OSError,
    )
    try:
        yield
    except failures as error:
        advice = "start the server, or name another store" if uri.startswith(SERVER) else "name another store"
        raise UserError(f"{key}: {uri} does not answer ({reason(error)}); {advice}") from error


def reason(error: BaseException) -> str:
    """Why a store does not answer, without the layers that its libraries wrap it in."""
    text = said(error)
    if cause := re.search(r"\[Errno -?\d+\] ([\w ]+)", text):
        return cause[1]
    if "timed out" in text:
        return "timed out"
    return text[:160] or type(error).__name__


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """The id of an experiment, which is made if need be.

    Raises:
        UserError: it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=artifact_location(uri)))
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"trainer.logger.init_args.experiment_name: {name} was deleted in {uri}; restore it or name another"
        )
    return str(found.experiment_id)


def find_experiment(client: MlflowClient, name: str, key: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UserError: there is none; the message lists the nearest names.
    """
    found = {experiment.name: experiment for experiment in client.search_experiments()}
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=3, cutoff=0.0)
        raise UserError(f"{key}: {name} is no experiment of this store; the nearest are {', '.join(nearest)}")
    return found[name]


def _check_sqlite(path: Path, uri: str, key: str) -> None:
    try:
        with path.open("r+b") as file:
            header = file.read(len(_SQLITE_HEADER))
    except OSError as error:
        raise UserError(f"{key}: {uri} cannot be written ({error.strerror})") from None
    if header not in (b"", _SQLITE_HEADER):
        raise UserError(f"{key}: {path} is no SQLite file; name another one")
