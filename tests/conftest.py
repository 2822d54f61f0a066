"""Settings of every test: no network, one thread, reproducible hypothesis examples."""

import contextlib
import gc
import os
import sqlite3
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pytest-xdist gives its workers 80 columns. Tables in a file have a width of their own.
os.environ.pop("COLUMNS", None)

import hypothesis
import pytest
import torch
from helpers import narrowed
from interpreter import hasten

# Triton reads this when it is first imported, which any library may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")
# The tensors of the tests are tiny: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser):
    about = "make keys and values of the small random models from latents of half the rank: of a layer, or of each head"
    parser.addoption("--low-rank", choices=["joint", "head"], help=about)


def pytest_configure(config):
    """Before tests are collected, which take functions by their names."""
    if config.getoption("low_rank"):
        from lrsa_lit.models import tiny

        whole = tiny.tiny_model
        tiny.tiny_model = lambda **options: narrowed(whole(**options), config.getoption("low_rank"))


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws without a seed of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def migrated_store():
    """MLflow makes the tables of one new SQLite store, by a second of migrations; those of the next are copies."""
    from mlflow.store.db import utils
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def unflushed(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF").close()

    event.listen(Engine, "connect", unflushed)
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(sqlite3.connect(":memory:")) as tables:
        migrate = utils._initialize_tables

        def is_empty(database):
            return not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

        def initialize(engine):
            with contextlib.closing(engine.raw_connection()) as connection:
                store = connection.driver_connection
                new = is_empty(store)
                if new and not is_empty(tables):
                    tables.backup(store)
                    return
                migrate(engine)
                if new:
                    store.backup(tables)

        patch.setattr(utils, "_initialize_tables", initialize)
        yield
    event.remove(Engine, "connect", unflushed)


@pytest.fixture(scope="session", autouse=True)
def _unflushed_files():
    """No test cuts the power: what is written outlives its process without the disk, which takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        # An error for a closed file.
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: collecting garbage need not look through it, neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        # Tests make many objects that live shortly, and few in cycles: looking for these as often as usual takes 3 %.
        gc.set_threshold(10_000, 10, 10)
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Models of the slow tests may have gigabytes, and their trainers are cycles."""
    try:
        return (yield)
    finally:
        if item.get_closest_marker("slow"):
            gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _hastened_interpreter():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET"):
        hasten()


@pytest.fixture(scope="session", autouse=True)
def _hastened_parser():
    """jsonargparse looks up 30,000 keys for a command: most have no dot, and take a tenth of its time to be split."""
    home = sys.modules.get("jsonargparse._namespace")
    if not hasattr(home, "add_clash_mark"):
        yield
        return
    parse = home.Namespace._parse_key

    def parse_key(self, key):
        plain = type(key) is str and key and "." not in key and " " not in key
        return (home.add_clash_mark(key), self, "") if plain else parse(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home.Namespace, "_parse_key", parse_key)
        yield


@pytest.fixture(scope="session", autouse=True)
def _published_questions():
    """HotpotQA's file is read and checked once: 45 MB of JSON take two seconds, each time."""
    homes = [sys.modules.get(f"lrsa_lit.data.{name}") for name in ("hotpotqa", "needle", "supporting_facts")]
    if None in homes:
        yield
        return
    read, known = homes[0].load_questions, {}

    def load_questions(source=homes[0].SOURCE, sha256=homes[0].SHA256, key=""):
        if (source, sha256) != (homes[0].SOURCE, homes[0].SHA256):
            return read(source, sha256, key)
        if not known:
            known[source] = read(source, sha256, key)
            gc.freeze()
        # What a test does to the list stays its own.
        return [*known[source]]

    with pytest.MonkeyPatch.context() as patch:
        for home in homes:
            patch.setattr(home, "load_questions", load_questions)
        yield


def pytest_collection_modifyitems(config, items):
    """The slow ones first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption("low_rank"):
        for item in items:
            if item.get_closest_marker("whole"):
                item.add_marker(pytest.mark.skip(reason="needs whole projections"))
