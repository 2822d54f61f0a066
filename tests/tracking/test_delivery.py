"""The thread that sends: in order, without loss, and never a reason for a training to stop."""

import logging
import threading

import pytest
from mlflow.exceptions import MlflowException

from lrsa_lit.tracking.delivery import Delivery


class Store:
    """Takes what it is sent, or does not answer, or refuses."""

    def __init__(self):
        self.taken, self.attempts, self.beats = [], threading.Semaphore(0), threading.Semaphore(0)
        self.error = None

    def take(self, values):
        self.attempts.release()
        if self.error is not None:
            raise self.error
        self.taken.extend(values)

    def beat(self):
        self.beats.release()


@pytest.fixture
def store():
    return Store()


def delivery(store, **options):
    return Delivery(store.take, store.beat, **{"every": 3600.0, "retry": 0.01} | options)


def test_all_is_sent_in_order(store):
    sender = delivery(store)
    for value in range(50):
        sender.metrics([value])
    sender.call("note", lambda: store.take(["note"]))
    assert sender.flush(10) == []
    assert [value for value in store.taken if value != "note"] == list(range(50))
    assert "note" in store.taken


def test_an_outage_is_said_once_and_nothing_is_lost(store, caplog):
    caplog.set_level(logging.INFO, "lrsa_lit.tracking")
    store.error = ConnectionError("[Errno 111] Connection refused")
    sender = delivery(store)
    sender.metrics([1])
    for _ in range(3):
        assert store.attempts.acquire(timeout=10)
    sender.metrics([2])
    store.error = None
    assert sender.flush(10) == []
    assert store.taken == [1, 2]
    said = [record.message for record in caplog.records]
    assert len([line for line in said if "does not answer (Connection refused)" in line]) == 1
    assert len([line for line in said if "answers again" in line]) == 1


def test_what_cannot_be_delivered_is_named(store):
    store.error = ConnectionError("no")
    sender = delivery(store)
    sender.metrics([1, 2])
    sender.call("predictions.json", lambda: store.take([0]))
    assert sender.flush(0.05) == ["2 metric values", "predictions.json"]


def test_a_refused_batch_is_dropped_and_the_next_one_sent(store, caplog):
    def refuse():
        raise MlflowException("no such run", error_code=1001)  # INVALID_PARAMETER_VALUE

    sender = delivery(store)
    for _ in range(2):
        sender.call("table", refuse)
    sender.metrics([1])
    assert sender.flush(10) == []
    assert store.taken == [1]
    assert [record.message for record in caplog.records] == ["The run's store refused table: no such run"]


def test_it_beats_until_it_rests(store):
    sender = delivery(store, every=0.01)
    for _ in range(3):
        assert store.beats.acquire(timeout=10)
    sender.rest()
    # What was under way when the rest began is over once something else has been sent.
    sender.metrics([1])
    assert sender.flush(10) == []
    while store.beats.acquire(blocking=False):
        pass
    sender.metrics([2])
    assert sender.flush(10) == []
    assert not store.beats.acquire(timeout=0.1)
    sender.rest(False)
    assert store.beats.acquire(timeout=10)
