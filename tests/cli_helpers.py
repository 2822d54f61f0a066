"""What the tests of the command line share."""

import contextlib
import signal
import sys
from pathlib import Path

import pytest

WHOLE = ["--config", "configs/debug/tiny.yaml"]
"""The debug config as it is shipped: eight questions."""
DEBUG = [*WHOLE, "--config", str(Path(__file__).with_name("short.yaml"))]
"""The same with two questions and shorter answers, which most tests of runs can do with."""
NO_LOGGER = ["--trainer.logger", "false"]
STOPS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, migrated_store):
    """Each test runs in a folder of its own, as a user far from the checkout would, with a cache of its own.

    It holds for the tests of a folder whose conftest, or of a file that, imports it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_ID", "RUN_CONTEXT"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.setattr(sys, "argv", ["lrsa"])
    return tmp_path


def refusal(captured, *arguments: str) -> str:
    """What a command says that ends with exit code 2: its line of error, the only one."""
    from lrsa_lit.cli.main import main

    captured.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == 2
    (line,) = [line for line in captured.readouterr().err.splitlines() if line.startswith("lrsa: error: ")]
    return line.removeprefix("lrsa: error: ")


def refused_before_anything_is_written(captured, folder: Path, options, files, named) -> None:
    """A fit of the debug config beside some files is refused; the line has all that is ``named``, and no run is there.

    It records to a store, which is not even made.
    """
    for name, text in files.items():
        (folder / name).write_text(text)
    error = refusal(captured, "fit", *DEBUG, "--validate_first", "false", *options)
    for part in named:
        assert part in error
    assert "Traceback" not in error
    assert not (folder / "runs").exists()
    assert not list(folder.rglob("*.ckpt"))
    assert not [path for path in folder.rglob("*.arrow") if "broken" in str(path)]


def recorded_runs(store: Path, experiment: str) -> list:
    """The runs of an experiment in an SQLite store, latest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


def forwards(*arguments):
    """Calls of the decoder in a fit of the debug config, validations included."""
    from transformers import LlamaModel

    from lrsa_lit.cli.main import main

    count = [0]
    original = LlamaModel.forward

    def counted(self, *args, **kwargs):
        count[0] += 1
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", counted)
        main(["fit", *DEBUG, *NO_LOGGER, *arguments])
    return count[0]


@contextlib.contextmanager
def before_step(number, action, task=None):
    """Fits do something before an optimizer step. In the end signals are handled again, which a stopped fit ignores."""
    from lrsa_lit.tasks import LongContextQA

    task = task or LongContextQA
    step, handlers = task.training_step, [(each, signal.getsignal(each)) for each in STOPS]

    def acting(self, batch, batch_idx):
        if self.global_step == number:
            action()
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "training_step", acting)
        try:
            yield
        finally:
            for stop in handlers:
                signal.signal(*stop)


def ctrl_c():
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible():
    """Start children as from a terminal: background jobs of a shell, this run maybe, ignore Ctrl-C and pass that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
