"""Addresses of MLflow stores: convert between paths and SQLite URIs, and keep passwords out of configs.

The user and password of ``MLFLOW_TRACKING_URI`` stay in the environment. Configs have the address without them, and
:func:`with_user` adds them again when the store is opened.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from lrsa_lit.errors import UserError, redacted

SQLITE = "sqlite:///"
DATABASE = "mlflow.db"
"""The file name of the store in a folder of runs."""

ENVIRONMENT = "MLFLOW_TRACKING_URI"
_SPECIAL = frozenset("?%")


def sqlite_uri(path: Path, key: str) -> str:
    """The URI by which MLflow opens this SQLite file; ``key`` is the setting for errors.

    Raises:
        UserError: no URI works. SQLAlchemy reads the text after a ``?`` as options and, from 2.1 on, decodes escapes
            such as ``%3F``, whereas MLflow would also create a folder with the escaped name.
    """
    uri = f"{SQLITE}{path}"
    if _SPECIAL & set(uri):
        import sqlalchemy

        if sqlalchemy.make_url(uri).database != str(path):
            hint = "a store's path must not contain '?' or escapes such as %3F; use another folder"
            raise UserError(key, path, hint=hint)
    return uri


def sqlite_path(uri: str, key: str) -> Path:
    """The absolute path of the file of an SQLite URI; a UserError if the URI has options or no file."""
    text: str | None = uri.removeprefix(SQLITE)
    if _SPECIAL & set(uri):
        import sqlalchemy

        url = sqlalchemy.make_url(uri)
        if url.query:
            raise UserError(key, uri, hint="options after a '?' are not supported")
        text = url.database
    if not text or text == ":memory:":
        raise UserError(key, uri, "sqlite:///PATH")
    return Path(text).absolute()


def store_uri(folder: str) -> str:
    """The store of ``MLFLOW_TRACKING_URI`` without user and password, or else the one in a folder of runs."""
    return redacted(os.environ.get(ENVIRONMENT, "")) or sqlite_uri(Path(folder, DATABASE), "trainer.default_root_dir")


def with_user(uri: str) -> str:
    """The address with the user and password of ``MLFLOW_TRACKING_URI``, if it is the same address."""
    named = os.environ.get(ENVIRONMENT, "")
    return named if named and uri == redacted(named) else uri


def register() -> None:
    """Register the resolvers of cli.yaml: ``${store_uri:FOLDER}``, and ``${better:SCORE}``, which gives min or max."""
    from omegaconf import OmegaConf

    if not OmegaConf.has_resolver("store_uri"):
        # Before 2.4, register_resolver has another meaning; from 2.4 on, register_new_resolver is deprecated.
        add = getattr(OmegaConf, "register_new_resolver", None) or OmegaConf.register_resolver
        with warnings.catch_warnings(action="ignore"):
            add("store_uri", store_uri)
            add("better", lambda score: "min" if score == "loss" else "max")
