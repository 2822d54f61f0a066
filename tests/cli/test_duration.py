"""The expected duration of a long first validation."""

from types import SimpleNamespace

import pytest

from lrsa_lit.callbacks import duration


@pytest.mark.parametrize(
    ("seconds", "batches", "said"),
    [
        (20.0, [12], "about 4 minutes (12 batches under 2 attentions"),
        (900.0, [4, 8], "about 3.0 hours"),
        (1.0, [12], ""),
    ],
)
def test_a_long_first_validation_is_announced_after_its_first_batch(seconds, batches, said, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    callback, task = duration.ValidationDuration(), SimpleNamespace(attentions={"": 0, "dense": 0})
    with caplog.at_level("INFO", logger="lrsa_lit"):
        for _ in range(3):
            callback.on_validation_batch_start(SimpleNamespace())
            now[0] += seconds
            callback.on_validation_batch_end(SimpleNamespace(num_val_batches=batches), task)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    assert all(said in line and "--validate_first false" in line for line in lines)
