"""Jobs as tasks of a Ray cluster, each with the GPUs that its trainer needs.

The machines must share the folders of the runs. If a worker dies, its job resumes on another one from the last
checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.experiments.jobs import STOP_SECONDS, Executor, Job, run

_KEY = "--on"
_ATTEMPTS = 4
_ANSWER_SECONDS = 10.0


@contextlib.contextmanager
def executor(on: str | None, seconds: float | None = None, jobs: int = 1) -> Iterator[Executor]:
    """Context manager that yields the executor of jobs.

    Args:
        on: None for this machine; ``ray`` or ``ray://HOST:PORT`` for a cluster.
        seconds: time limit, after which no job is started and running jobs are stopped; None for no limit.
        jobs: number of jobs that run at the same time on this machine, at least 1.

    Raises:
        UserError: Ray is not installed, or does not answer.
    """
    if on is None:
        yield Executor(seconds, jobs)
        return
    ray = _connected(on)
    try:
        yield OnRay(ray, seconds)
    finally:
        ray.shutdown()


class OnRay(Executor):
    """Runs units in parallel, as many as the cluster has room for; the jobs of a unit run one after another.

    Args:
        ray: the connected module ``ray``.
        seconds: time limit, after which no job is started and running jobs are stopped; None for no limit.
    """

    def __init__(self, ray: Any, seconds: float | None = None) -> None:
        # All units at once: Ray starts a task when a machine has room for it.
        super().__init__(seconds, math.inf)
        self._ray, self._task = ray, ray.remote(max_retries=0)(_run)
        self._attempts: dict[Any, int] = {}

    def start(self, job: Job) -> Any:
        """Submit a job as a task."""
        return self._submit(job, 1)

    def wait(self, seconds: float) -> list[tuple[Any, int]]:
        """The ended tasks and their exit codes; a task whose worker has died is submitted again."""
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        ended = []
        for task in done:
            attempt = self._attempts.pop(task)
            try:
                ended.append((task, self._ray.get(task)))
            except self._ray.exceptions.RayError as error:
                if attempt < _ATTEMPTS:
                    print("a worker died; its job continues on another one", flush=True)
                    unit, job = self._running.pop(task)
                    self._running[self._submit(job, attempt + 1)] = unit, job
                else:
                    print(f"a worker died {_ATTEMPTS} times: {message_of(error)}", flush=True)
                    ended.append((task, -9))
        return ended

    def stop(self, handles: Sequence[Any], number: signal.Signals) -> None:
        """Cancel the running tasks, and give them time to save their checkpoints."""
        for task in handles:
            self._ray.cancel(task)
        if handles:
            self._ray.wait(handles, num_returns=len(handles), timeout=STOP_SECONDS)

    def _submit(self, job: Job, attempt: int) -> Any:
        nodes = (node["Resources"].get("GPU", 0) for node in self._ray.nodes() if node["Alive"])
        gpus = gpus_of(job.trainer, int(max(nodes, default=0)))
        task = self._task.options(num_cpus=1, num_gpus=gpus).remote(job.command(), job.variables(), os.getcwd())
        self._attempts[task] = attempt
        return task


def gpus_of(trainer: Mapping[str, Any], largest: int) -> int:
    """Number of GPUs that a trainer needs; raises a UserError if the largest machine has fewer (``largest``)."""
    if trainer.get("accelerator") == "cpu" or not largest:
        return 0
    devices = trainer.get("devices", 1)
    count = str(len(devices) if isinstance(devices, list) else devices)
    asked = int(count) if count.isdecimal() else largest
    if asked > largest:
        told = f"is not allowed; the machines of the cluster have up to {largest}"
        raise UserError("trainer.devices", devices, reason=told)
    return asked


def _connected(address: str) -> Any:
    if importlib.util.find_spec("ray") is None:
        raise UserError(_KEY, address, reason="needs Ray, which is not installed; pip install 'lrsa-lit[ray]'")
    if address != "ray":
        _check_answers(address)
    # Otherwise Ray would rebuild each worker's environment from this checkout.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray
    import ray.exceptions

    try:
        ray.init(None if address == "ray" else address, log_to_driver=True, include_dashboard=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(_KEY, address, reason=f"does not answer ({message_of(error)})") from None
    return ray


def _check_answers(address: str) -> None:
    """Check that the address answers, because Ray itself would try for half a minute."""
    try:
        found = urlsplit(address)
        host, port = found.hostname, found.port
    except ValueError:
        # The port is not a number, or brackets do not enclose an IPv6 address.
        host = port = None
    if not address.startswith("ray://") or not host or not port:
        raise UserError(_KEY, address, "ray, or ray://HOST:PORT")
    try:
        socket.create_connection((host, port), _ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(_KEY, address, reason=f"does not answer ({error.strerror or error})") from None


def _run(arguments: list[str], environment: Mapping[str, str], folder: str) -> int:
    """Run a command in a worker, in the shared folder; cancelling raises KeyboardInterrupt here."""
    os.chdir(folder)
    return run(arguments, environment)
