"""The expected duration of a long first validation."""

from types import SimpleNamespace

import pytest
import torch

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.callbacks import duration
from lrsa_lit.models import Backbone
from lrsa_lit.tasks import LongContextQA


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
            callback.on_validation_batch_start(SimpleNamespace(), task)
            now[0] += seconds
            callback.on_validation_batch_end(SimpleNamespace(num_val_batches=batches), task)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    assert all(said in line and "--validate_first false" in line for line in lines)


@pytest.mark.parametrize(("answers", "minutes"), [(True, 6), (False, 3)])
def test_on_a_cpu_it_is_guessed_before_the_first_batch(answers, minutes, monkeypatch, caplog):
    """A forward of n tokens takes n seconds here, and each attention two passes and three tokens of answers."""
    now, lengths = [0.0], []
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    task = LongContextQA(Backbone("tiny"), LRSAConfig(4, 32, 8), max_new_tokens=3, generate_answers=answers)
    task.configure_model()

    def takes(_, __, given):
        lengths.append(given["input_ids"].numel())
        now[0] += lengths[-1]

    task.model.register_forward_pre_hook(takes, with_kwargs=True)
    callback, trainer = duration.ValidationDuration(), SimpleNamespace(num_val_batches=[2])
    batch = {"input_ids": torch.full((1, 90), 5)}
    with caplog.at_level("INFO", logger="lrsa_lit"):
        for _ in range(2):
            callback.on_validation_batch_start(trainer, task, batch)
            now[0] += 20
            callback.on_validation_batch_end(trainer, task)
    assert lengths == [1, 1, 64]
    (guessed,) = [record.getMessage() for record in caplog.records]
    assert f"about {minutes} minutes (2 batches under 1 attention, estimated from 64 tokens" in guessed
