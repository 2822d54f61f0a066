"""Addresses of stores: paths that URIs have to escape, and users with passwords that stay in the environment."""

import string
from pathlib import Path

import pytest
import sqlalchemy
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st

from lrsa_lit.cli.main import main
from lrsa_lit.errors import UserError, redacted
from lrsa_lit.tracking.store import answering, artifact_location, checked_uri, connect, experiment_id
from lrsa_lit.uris import sqlite_path, sqlite_uri, store_uri, with_user

USERS = [
    ("http://joe:hunter2@host:5000", "http://host:5000"),
    ("https://joe@host/mlflow", "https://host/mlflow"),
    ("postgresql+psycopg2://joe:hunt/er2@db/runs", "postgresql+psycopg2://db/runs"),
    ("postgresql://joe:hun@ter2@db/runs", "postgresql://db/runs"),
    ("mysql://db/runs?user=joe&password=hunter2&ssl=1", "mysql://db/runs?user=***&password=***&ssl=1"),
    ("mssql+pyodbc:///?odbc_connect=SERVER%3Ddb%3BUID%3Djoe%3BPWD%3Dhunter2", "mssql+pyodbc:///?odbc_connect=***"),
]
FREE = ["sqlite:////home/a@b/c:d@e/mlflow.db", "http://host:5000/a", "mail joe@host", "sqlite:///runs/mlflow.db"]


@given(st.text(string.printable.strip() + " ü", min_size=1, max_size=12).filter(lambda name: "/" not in name))
def test_a_path_comes_back_from_its_uri_or_is_refused(name):
    path = Path("/stores", name, "mlflow.db")
    if sqlalchemy.make_url(f"sqlite:///{path}").database != str(path):
        assert {"?", "%"} & set(name)
        with refused("k", path):
            sqlite_uri(path, "k")
        return
    assert sqlite_path(sqlite_uri(path, "k"), "k") == path


@pytest.mark.parametrize("name", ["100% #1; a@b:c", "a%3Fb", "a%41", "what?"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_store_is_made_in_its_folder_or_refused(name, relative, tmp_path, monkeypatch, migrated_store):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder if relative else tmp_path)
    runs = "runs" if relative else str(folder / "runs")
    if sqlalchemy.make_url(f"sqlite:///{folder}").database != str(folder):
        with pytest.raises(UserError):
            checked_uri(store_uri(runs))
        assert [path.name for path in tmp_path.iterdir()] == [name]
        return
    uri = checked_uri(store_uri(runs))
    client = connect(uri)
    run = client.create_run(experiment_id(client, None, uri))
    client.log_text(run.info.run_id, "hello", "note.txt")
    assert (folder / "runs/mlflow.db").stat().st_size
    assert next((folder / "runs/artifacts").rglob("note.txt")).read_text() == "hello"
    assert artifact_location(uri) == (folder / "runs/artifacts").as_uri()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("uri", ["sqlite:///runs/a.db?timeout=3", "sqlite:///", "sqlite:///:memory:"])
def test_what_names_no_file_is_refused(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("k", uri):
        checked_uri(uri, "k")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("uri", "shown"), USERS)
def test_users_and_passwords_are_left_out(uri, shown, monkeypatch):
    assert redacted(f"asked {uri} twice: '{uri}'") == f"asked {shown} twice: '{shown}'"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store_uri("runs") == shown
    assert with_user(shown) == checked_uri(shown) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://joe:secret@another")
    assert checked_uri(shown) == shown


@pytest.mark.parametrize("text", FREE)
def test_other_text_stays(text):
    assert redacted(text) == text


def test_an_error_does_not_tell_the_password():
    uri = "http://joe:hunter2@127.0.0.1:9"
    with pytest.raises(UserError) as caught:
        connect(uri, "k")
    assert str(caught.value).startswith("k: http://127.0.0.1:9 does not answer")
    with pytest.raises(UserError) as caught, answering(uri, "k"):
        raise OSError(f"no way to {uri}/api")
    assert "hunter2" not in str(caught.value)


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert store_uri("runs") == "sqlite:///runs/mlflow.db"


def test_a_deleted_store_is_one_line_of_ours(tmp_path, caplog, migrated_store):
    uri = checked_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = connect(uri)
    (tmp_path / "mlflow.db").write_bytes(b"no database any more" * 1000)
    with refused("k", reason="sqlite:///"), answering(uri, "k"):
        client.create_experiment("new")
    assert not [record for record in caplog.records if record.exc_info]


def test_a_folder_of_runs_that_no_uri_names_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "configs/debug/tiny.yaml", "--trainer.default_root_dir", "what?"])
    assert capsys.readouterr().err.startswith("lrsa: error: trainer.default_root_dir: what?/mlflow.db is not allowed;")
    assert not list(tmp_path.iterdir())
