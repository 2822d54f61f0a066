"""Kill a fit with SIGKILL, resume it, and compare it with one that nobody killed: are they equal in every bit?

    python benchmarks/kill.py --trials 30 --json benchmarks/results/kill.json

Each trial is a real process of `lrsa fit` on the CPU: a tiny model with dropout, on shuffled and packed data that two
workers make. It is killed either at a random moment of a random batch or validation, or by itself after a random number
of bytes of a checkpoint. Then the same command runs with `--ckpt_path last`. Compared with the run that was not killed
are, for each batch, the sample ids, the loss, the random number generators, and the weights after it; each logged
metric; and, in the last checkpoint, all there is: weights, optimizer, schedule, counters, callbacks, positions in the
data.

Arguments after `--` go to every fit, for example: -- --data.init_args.num_workers 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from recorded_fit import LAST, cases, common, digest, events, leaves, write_records
from rich.console import Console
from rich.table import Table

from lrsa_lit.checkpoints import checkpoint_io
from lrsa_lit.cli.main import main as lrsa


def start(folder: Path, arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a process that runs a command in a folder, with everything imported; returns its id."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.chdir(folder)
        with open("output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        prepare()
        lrsa(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Kill(NamedTuple):
    """When to kill: after so many batches (or validation batches) have begun, or so far into a checkpoint's write.

    Attributes:
        where: "moment" or "write".
        count: batches of training or validation that have begun; or checkpoints written before.
        share: of a batch's duration; or of the checkpoint's bytes, with 1 being after all of them, before the renaming.
    """

    where: str
    count: int
    share: float


def kill_at_moment(child: int, folder: Path, kill: Kill, seconds: float) -> None:
    """Kill a process some time into a batch."""
    while sum(event["kind"] in ("ids", "validation") for event in events(folder)) < kill.count:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    time.sleep(kill.share * seconds)
    os.kill(child, signal.SIGKILL)


def kill_in_write(kill: Kill, size: int) -> None:
    """Let this process kill itself in the middle of writing a checkpoint."""
    write_atomically, saved = checkpoint_io.write_atomically, 0

    def dying(path: Path, write: Callable[[Any], object]) -> None:
        nonlocal saved
        saved += 1
        if saved <= kill.count:
            write_atomically(path, write)
            return

        def write_some(file: Any) -> None:
            write(DyingFile(file, int(kill.share * size)))
            os.kill(os.getpid(), signal.SIGKILL)

        write_atomically(path, write_some)

    checkpoint_io.write_atomically = dying


class DyingFile:
    """A file whose process dies when so many bytes are written."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= self.left:
            self.file.write(view[: self.left])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= len(view)
        return int(self.file.write(view))

    def flush(self) -> None:
        self.file.flush()


class Reference(NamedTuple):
    """The run that nobody killed."""

    events: dict[tuple[str, str], Any]
    checkpoint: dict[str, Any]
    batches: int
    saves: int
    size: int
    seconds: float


def reference(folder: Path, arguments: list[str]) -> Reference:
    """Run a case to its end."""
    saves = folder / "saves"

    def count_saves() -> None:
        write_atomically = checkpoint_io.write_atomically

        def counting(path: Path, write: Callable[[Any], object]) -> None:
            write_atomically(path, write)
            with saves.open("a") as file:
                file.write(f"{path}\n")

        checkpoint_io.write_atomically = counting

    # Once, so that the second run finds the data prepared and its duration is that of the others.
    began = time.perf_counter()
    if code := finish(start(folder, arguments, count_saves)):
        raise SystemExit(f"the run that nobody kills ended with {code}:\n{(folder / 'output.txt').read_text()}")
    found = events(folder)
    batches = sum(event["kind"] in ("ids", "validation") for event in found)
    return Reference(
        {(event["kind"], event["key"]): event["value"] for event in found},
        torch.load(folder / LAST, weights_only=True),
        batches,
        len(saves.read_text().splitlines()),
        (folder / LAST).stat().st_size,
        (time.perf_counter() - began) / batches / 3,
    )


def differences(expected: Reference, folder: Path) -> list[str]:
    """In what a killed and resumed run differs from the other."""
    found: dict[tuple[str, str], Any] = {}
    wrong = []
    for event in events(folder):
        key = (event["kind"], event["key"])
        found[key] = event["value"]
        if key not in expected.events:
            wrong.append(f"{key[0]} of {key[1]} is not in the other")
        elif expected.events[key] != event["value"]:
            wrong.append(f"{key[0]} of {key[1]}")
    wrong += [f"{kind} of {key} is missing" for kind, key in expected.events.keys() - found.keys()]
    ours, theirs = torch.load(folder / LAST, weights_only=True), expected.checkpoint
    mine, others = dict(leaves("", ours)), dict(leaves("", theirs))
    wrong += [f"checkpoint{name}" for name in mine.keys() ^ others.keys()]
    wrong += [f"checkpoint{name}" for name in mine.keys() & others.keys() if not same(mine[name], others[name])]
    return wrong


def same(one: Any, other: Any) -> bool:
    """Whether two values have the same bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and digest(one) == digest(other)
    return bool(one == other) or (one != one and other != other)


def trial(folder: Path, arguments: list[str], kill: Kill, expected: Reference) -> dict[str, Any]:
    """Kill a run, resume it, compare."""
    prepare = (lambda: kill_in_write(kill, expected.size)) if kill.where == "write" else lambda: None
    child = start(folder, arguments, prepare)
    if kill.where == "moment":
        kill_at_moment(child, folder, kill, expected.seconds)
    killed = finish(child) == -signal.SIGKILL
    died = [event for event in events(folder) if event["kind"] in ("ids", "validation")]
    found = sorted((folder / LAST.parent).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    partial = len(list((folder / LAST.parent).glob(".*.partial")))
    step, batch = position(found[-1]) if found else (0, 0)
    code = finish(start(folder, [*arguments, "--ckpt_path", "last"]))
    wrong = (
        differences(expected, folder)
        if code == 0
        else [f"exit code {code}: {(folder / 'output.txt').read_text()[-600:]}"]
    )
    left = [path.name for path in (folder / LAST.parent).glob(".*")]
    return {
        "kill": kill.where,
        "killed": killed,
        "at": f"{died[-1]['kind'].replace('ids', 'training')}: {died[-1]['key']}" if died else "before the first batch",
        "half_written": partial,
        "resumed_from_step": step,
        "mid_epoch_after_checkpoint": bool(found) and batch != 0,
        "differences": [*wrong, *(f"left behind: {name}" for name in left)],
    }


def position(path: Path) -> tuple[int, int]:
    """The optimizer steps of a checkpoint, and the batches of its epoch; 0 batches at an epoch's end."""
    state = torch.load(path, weights_only=True)
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return int(state["global_step"]), 0 if progress["is_last_batch"] else int(progress["current"]["ready"])


def plan(trials: int, seed: int, expected: list[Reference]) -> list[tuple[int, Kill]]:
    """Which case is killed when: one in three within a write, the others at any moment from the start to the end."""
    chance, kills = random.Random(seed), []
    for number in range(trials):
        case = number % len(expected)
        if number % 3 == 2:
            saves = expected[case].saves
            kills.append((case, Kill("write", chance.randrange(saves), chance.choice([chance.random(), 1.0]))))
        else:
            kills.append((case, Kill("moment", chance.randrange(1, expected[case].batches + 1), chance.random())))
    return kills


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("fit", nargs="*", help="after --: arguments of every fit")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All trials, in folders below ``root``."""
    os.environ["LRSA_CACHE_DIR"] = str(root / "cache")
    write_records(root / "records.jsonl")
    (root / "common.yaml").write_text(yaml.safe_dump(common(root / "records.jsonl", options.steps)))
    commands, expected = [], []
    for number, case in enumerate(cases()):
        path = root / f"case{number}.yaml"
        path.write_text(yaml.safe_dump(case.config))
        commands.append(["fit", "--config", str(root / "common.yaml"), "--config", str(path), *options.fit])
        expected.append(reference(root / f"reference{number}", commands[-1]))
    results = []
    for number, (case, kill) in enumerate(plan(options.trials, options.seed, expected)):
        result = trial(root / f"trial{number}", commands[case], kill, expected[case])
        results.append({"case": cases()[case].name, **result})
        print(f"{number + 1:>3}  {json.dumps(results[-1])}", flush=True)
    return {
        "torch": torch.__version__,
        "device": "cpu",
        "steps": options.steps,
        "seed": options.seed,
        "fit": options.fit,
        "trials": len(results),
        "equal": sum(not result["differences"] for result in results),
        "mid_epoch_after_checkpoint": sum(result["mid_epoch_after_checkpoint"] for result in results),
        "inside_a_write": sum(result["half_written"] > 0 for result in results),
        "results": results,
    }


def table(summary: Mapping[str, Any]) -> Table:
    """A row for each trial."""
    shown = Table(
        title=f"{summary['equal']} of {summary['trials']} resumed runs are equal in every bit; "
        f"{summary['mid_epoch_after_checkpoint']} killed mid-epoch after a checkpoint, "
        f"{summary['inside_a_write']} inside a checkpoint's write"
    )
    for column in ("case", "kill", "while in", "half-written", "resumed from step", "differences"):
        shown.add_column(column)
    for result in summary["results"]:
        shown.add_row(
            result["case"],
            result["kill"],
            result["at"],
            str(result["half_written"]),
            str(result["resumed_from_step"]),
            ", ".join(result["differences"][:3]) or "none",
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    # Before the first fork: importing is what takes time.
    import mlflow.system_metrics.system_metrics_monitor  # noqa: F401
    import peft  # noqa: F401

    import lrsa_lit.cli.lightning_cli
    import lrsa_lit.models.tiny  # noqa: F401

    torch.set_num_threads(1)
    options = parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        summary = run(options, Path(folder))
    Console(width=160).print(table(summary))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if summary["equal"] < summary["trials"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
