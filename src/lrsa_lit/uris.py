"""Addresses of stores: between a path and its SQLite URI, and without the user and password that a server takes.

The user and password of ``MLFLOW_TRACKING_URI`` stay in the environment: a config has the address without them, and
:func:`with_user` puts them back where the store is opened.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from lrsa_lit.errors import UserError, redacted

SQLITE = "sqlite:///"
DATABASE = "mlflow.db"
"""The store in a folder of runs."""

ENVIRONMENT = "MLFLOW_TRACKING_URI"
_SPECIAL = frozenset("?%")


def sqlite_uri(path: Path, key: str) -> str:
    """The URI under which MLflow opens this SQLite file and makes no other folder; ``key`` is the setting for errors.

    Raises:
        UserError: there is none. SQLAlchemy takes what follows a ``?`` for options and, from 2.1 on, reads escapes
            such as ``%3F``; MLflow would make the folder of the escaped name as well.
    """
    uri = f"{SQLITE}{path}"
    if _SPECIAL & set(uri):
        import sqlalchemy

        if sqlalchemy.make_url(uri).database != str(path):
            hint = "a store's path must hold no '?' and no escape such as %3F, so name another folder"
            raise UserError(key, path, hint=hint)
    return uri


def sqlite_path(uri: str, key: str) -> Path:
    """The absolute path of the file that an SQLite URI names; a UserError if it has options, or names no file."""
    text: str | None = uri.removeprefix(SQLITE)
    if _SPECIAL & set(uri):
        import sqlalchemy

        url = sqlalchemy.make_url(uri)
        if url.query:
            raise UserError(key, uri, hint="a store here has no options after a '?'")
        text = url.database
    if not text or text == ":memory:":
        raise UserError(key, uri, "sqlite:///PATH")
    return Path(text).absolute()


def store_uri(folder: str) -> str:
    """The store of ``MLFLOW_TRACKING_URI``, without a user and password, else the one in a folder of runs."""
    return redacted(os.environ.get(ENVIRONMENT, "")) or sqlite_uri(Path(folder, DATABASE), "trainer.default_root_dir")


def with_user(uri: str) -> str:
    """The address with the user and password of ``MLFLOW_TRACKING_URI`` where it is that one."""
    named = os.environ.get(ENVIRONMENT, "")
    return named if named and uri == redacted(named) else uri


def register() -> None:
    """Let cli.yaml name the store, ``${store_uri:FOLDER}``, and the better values of a score, ``${better:SCORE}``."""
    from omegaconf import OmegaConf

    if not OmegaConf.has_resolver("store_uri"):
        # Before 2.4 the new name is that of a resolver of another kind; from then on the old one is deprecated.
        add = getattr(OmegaConf, "register_new_resolver", None) or OmegaConf.register_resolver
        with warnings.catch_warnings(action="ignore"):
            add("store_uri", store_uri)
            add("better", lambda score: "min" if score == "loss" else "max")
