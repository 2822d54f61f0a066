"""Jobs on a Ray cluster: of two machines with a core each, all of them this one."""

import os
import sys

import pytest

from lrsa_lit.errors import UserError
from lrsa_lit.experiments.jobs import Executor, Job
from lrsa_lit.experiments.on_ray import OnRay, _connected, executor, gpus_of

STUB = """
import os, pathlib, signal, sys
name, ends, begun = sys.argv[1:]
with open(f"{name}.log", "a") as log:
    log.write(f"{begun} ")
if ends == "kills" and begun == "anew":
    pathlib.Path(f"{name}.ckpt").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
sys.exit({"fails": 3}.get(ends, 0))
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands in place of those of the package, which write what they were told into the working directory."""
    package = tmp_path / "stub/lrsa_lit/cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "__main__.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    return {"PYTHONPATH": str(tmp_path / "stub")}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # The workers import the tests' own package.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


def units(environment, ends, table):
    """A unit of two jobs for each name; the first one ends as it is told."""

    def unit(name, end):
        def command():
            return [name, end, "resumed" if os.path.exists(f"{name}.ckpt") else "anew"]

        first = yield Job(command, {}, environment, {"accelerator": "auto"})
        second = None if first else (yield Job(lambda: [name, "well", "second"], {}, environment, {}))
        table[name] = first, second

    return [unit(name, end) for name, end in ends.items()]


ENDS = {"a": "well", "b": "kills", "c": "fails", "d": "well"}


def test_the_table_is_that_of_a_local_run(commands, cluster, tmp_path):
    here, on_ray = {}, {}
    Executor().drive(units(commands, ENDS | {"b": "well"}, here), lambda: None)
    assert here == {"a": (0, 0), "b": (0, 0), "c": (3, None), "d": (0, 0)}
    for log in tmp_path.glob("*.log"):
        log.unlink()
    with executor("ray") as runs:
        assert isinstance(runs, OnRay)
        runs.drive(units(commands, ENDS, on_ray), lambda: None)
    assert on_ray == here
    # A worker has died, and its job has gone on from its checkpoint.
    assert (tmp_path / "b.log").read_text().split() == ["anew", "resumed", "second"]


@pytest.mark.parametrize(
    ("trainer", "gpus"),
    [
        ({"devices": 2}, 2),
        ({"devices": "auto"}, 4),
        ({"devices": [0, 3]}, 2),
        ({"accelerator": "cpu", "devices": 3}, 0),
    ],
)
def test_gpus_are_those_of_the_trainer(trainer, gpus):
    assert gpus_of(trainer, 4) == gpus
    assert gpus_of(trainer, 0) == 0


def test_more_gpus_than_a_machine_has():
    with pytest.raises(UserError) as error:
        gpus_of({"devices": 5}, 4)
    assert error.value.field == "trainer.devices"


@pytest.mark.parametrize(
    "address",
    ["ray://127.0.0.1:9", "here", "ray://127.0.0.1", "ray://127.0.0.1:abc", "ray://127.0.0.1:70000", "ray://[::1"],
)
def test_a_cluster_that_is_not_there(address):
    with pytest.raises(UserError) as error:
        _connected(address)
    assert error.value.field == "--on"


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as error:
        _connected("ray")
    assert error.value.field == "--on"
