"""Tests in several processes, and commands in them as torchrun starts them.

A server that has imported the package forks them: importing takes each of them longer than what it is there for.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessException

COUNT = 2

multiprocessing.set_forkserver_preload(
    ["lrsa_lit.cli.lightning_cli", "mlflow.system_metrics.system_metrics_monitor", "peft"]
)


def start(function: Callable[..., None], *arguments: Any, count: int = COUNT) -> None:
    """Call a function in each of some processes with its rank and a free port of all, and wait for their ends.

    Raises:
        ProcessException: one of them failed.
    """
    context = _started(function, *arguments, count=count)
    while not context.join():
        pass


def _started(function: Callable[..., None], *arguments: Any, count: int = COUNT) -> ProcessContext:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return torch.multiprocessing.start_processes(
        function, (port, *arguments), nprocs=count, join=False, start_method="forkserver"
    )


def run(arguments: list[str], folder: Path) -> str:
    """Run a command in a folder; returns what the processes have written.

    Raises:
        AssertionError: one of them failed.
    """
    outputs = [folder / f"output-{rank}" for rank in range(COUNT)]
    try:
        start(_run, dict(os.environ), arguments, folder, outputs)
    except ProcessException as error:
        raise AssertionError("".join(output.read_text() for output in outputs)) from error
    return "".join(output.read_text() for output in outputs)


def refused(arguments: list[str], folder: Path) -> list[str]:
    """Run a command that each process ends with exit code 2; returns what each has written."""
    outputs = [folder / f"output-{rank}" for rank in range(COUNT)]
    ended = _started(_run, dict(os.environ), arguments, folder, outputs).processes
    for process in ended:
        process.join()
    written = [output.read_text() for output in outputs]
    assert [process.exitcode for process in ended] == [2] * COUNT, written
    return written


def _run(rank: int, port: int, environment: dict[str, str], arguments: list[str], folder: Path, outputs: list[Path]):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    sizes = {"WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT, "GROUP_WORLD_SIZE": 1}
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.clear()
    os.environ.update(environment | {name: str(value) for name, value in (ranks | sizes | found).items()})
    os.chdir(folder)
    with outputs[rank].open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    sys.argv = ["lrsa"]
    from lrsa_lit.cli.main import main

    main(arguments)
