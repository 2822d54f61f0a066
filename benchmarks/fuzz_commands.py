"""Give every command bad input at random: does each try end well, or in one line that says what is wrong?

    python benchmarks/fuzz_commands.py --tries 250 --seed 0 --json benchmarks/results/fuzz_commands.json

A try is a valid command in which one thing is changed: the value of a flag or setting, a name, or a part of a file that
the command reads (YAML, JSONL, a model's config.json or tokenizer, a checkpoint). It must exit with code 0, or with
code 2 and exactly one line `lrsa: error: …` on stderr. Anything else is a failure: a traceback, another code, more than
--seconds, or more than 8 GiB. Failures are printed with their input; the exit code is 1 if there are any. The same seed
gives the same tries; --only N repeats the N-th.

Each try runs in a process forked from this one, in which everything is imported, so 250 tries take a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

from lrsa_lit.cli.main import main as lrsa
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

MEMORY = 8 * 2**30
TEXTS = [
    *("", " ", "-1", "0", "1", "3.5", "1e99", "-1e99", "nan", ".inf", str(10**30), "9" * 5000, "true", "null", "~x"),
    *("a" * 5000, "a\0b", "\udce9", "é", "{", "[", "{}", "[]", "{a: 1}", "[1, 2]", "[null]", "*", "(", "%s", "${x}"),
    *("&a [*a]", "!!python/name:os.system", "package://", "package:///x", "package://a/../b", "package://pip/x"),
    *("http://localhost:1", "sqlite:///", "file:///proc/x", "mps", "tpu", "cuda:99", "bfloat16", "os.getcwd"),
]
PATHS = [
    *("nowhere", "/dev/zero", "/dev/null", "/proc/x", "/proc/self/mem", ".", "folder", "text.txt", "junk.bin"),
    *(
        "junk.ckpt",
        "junk.gguf",
        "junk.json",
        "utf16.txt",
        "model",
        "model/config.json",
        "pipe",
        "pipe.ckpt",
        "pipe.gguf",
    ),
    *("fit.ckpt", "loop", "loop/x", "a/b/c", "x" * 300, "text.txt/x", "folder.ckpt", "empty.ckpt", "train.jsonl"),
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 3.5, 1e99, -1e99, 10**30, "", "x", "3", "a\0b", [], [3], ["x"], {}, {"x": 1}),
]
SETTINGS = {
    "model": "backbone backbone.source backbone.sha256 backbone.dtype backbone.gradient_checkpointing backbone.lora "
    "backbone.lora.rank backbone.lora.dropout backbone.lora.target_modules backbone.compile_layers "
    "backbone.quantization backbone.trust_remote_code backbone.rope_scaling backbone.rope_scaling.factor "
    "backbone.random_weights lrsa lrsa.sink_size lrsa.lag_size lrsa.top_k lrsa.chunk_size lrsa.value_weight "
    "lrsa.dense_layers lrsa.compressor optimizer optimizer.lr lr_scheduler train_attention train_top_k evaluate "
    "max_new_tokens template_arguments",
    "data": "class_path init_args.train init_args.val init_args.test init_args.max_tokens init_args.batch_size "
    "init_args.eval_batch_size init_args.seed init_args.limit init_args.packing init_args.group_by_length "
    "init_args.curriculum",
    "trainer": "accelerator strategy precision logger logger.tracking_uri logger.experiment_name logger.run_name "
    "logger.run_id callbacks fast_dev_run max_epochs min_epochs max_steps min_steps max_time limit_train_batches "
    "limit_val_batches limit_test_batches limit_predict_batches overfit_batches val_check_interval "
    "check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar "
    "enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm deterministic benchmark "
    "inference_mode use_distributed_sampler profiler detect_anomaly barebones plugins sync_batchnorm "
    "reload_dataloaders_every_n_epochs default_root_dir",
}
"""Settings to change. Numbers of processes are not among them: a huge one is obeyed."""
YAML = [
    *("", "# x", "3", "- 1", "null", "model: [", "a: &a [*a]", "model: &a {lrsa: *a}", "model: &a {evaluate: {x: *a}}"),
    *("--- {}\n--- {}", "model: {? [1, 2] : 3}", "model: {<<: 3}", "<<: *x", "\ufeffmodel: {}", "model:\t{}", "!x {}"),
    *("!!python/object/apply:os.getcwd []", "model: !!float x", 'model: "a\\0b"', "model: 3", "trainer: x", "data: []"),
    *("model: {lrsa: {top_k: 0o17}}", "model: {lrsa: {top_k: 12:30:45}}", "model: {lrsa: {top_k: 2020-01-01}}"),
    *("model: {evaluate: {1: null}}", "model: {evaluate: {a: 3}}", "model: {evaluate: [x]}", "model: ${model}"),
    *("trainer: {max_steps: '${trainer.max_steps}'}", "model: {lrsa: {top_k: '${model.no}'}}", "seed_everything: x"),
    *("trainer: {callbacks: {}}", "trainer: {callbacks: [3]}", "trainer: {callbacks: [{class_path: os.getcwd}]}"),
    *("trainer: {logger: [true]}", "trainer: {logger: {class_path: x}}", "trainer: {plugins: [x]}", "trainer: {1: 2}"),
    *("data: {class_path: 3}", "data: {class_path: lrsa_lit.data.No}", "data: {class_path: os.getcwd}", "1: 2"),
    *("model: {optimizer: {class_path: torch.optim.No}}", "model: {lr_scheduler: {class_path: os.getcwd}}"),
    *("data: {init_args: {train: [1]}}", "data: {init_args: 3}", "model: {backbone: tiny}", "model: {backbone: []}"),
    *("a: " + "[" * 3000, "a: " + "{a: " * 500, "model: " + "9" * 5000, "seed_everything: -1", "ckpt_path: [1]"),
    "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 25)),
]
LINES = [
    *("", "{", "[]", "3", "null", '"x"', "{}", '{"id": 1}', "\ufeff{}", "{" * 5000, "[" * 100_000, "9" * 5000),
    *('{"id": "a", "id": "b"}', '{"id": "\\ud83d"}', '{"id": NaN}', '{"a\\u0000": 1}'),
]


class Try(NamedTuple):
    """A command and the files to be written before."""

    arguments: list[str]
    prepare: Callable[[], None] = lambda: None
    note: str = ""


class Tries:
    """Draws tries; all randomness is that of one generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def draw(self) -> Try:
        kinds = [self.ask, self.export, self.ui, self.sweep, self.study, self.setting, self.setting, self.names]
        kinds += [self.yaml, self.yaml, self.lines, self.json_file, self.json_file, self.checkpoint, self.checkpoint]
        return self.rng.choice(kinds)()

    def value(self) -> str:
        return self.rng.choice(self.rng.choice([TEXTS, PATHS]))

    def ask(self) -> Try:
        flags = ["--model", "--lag-size", "--top-k", "--sink-size", "--chunk-size", "--rope-scaling", "--dtype"]
        flags += ["--max-new-tokens", "--device", "--template-arguments", "QUESTION", "FILE"]
        flag, value = self.rng.choice(flags), self.value()
        # A pipe without a writer is waited for.
        text = value if flag == "FILE" and not value.startswith("pipe") else "text.txt"
        question = value if flag == "QUESTION" else "Who?"
        given = [f"{flag}={value}"] if flag.startswith("--") else []
        return Try([*ask_of("tiny"), *given, *self.rng.choice([[], ["--dense"], ["--json"]]), "--", text, question])

    def export(self) -> Try:
        checkpoint, options = "fit.ckpt", ["--out=new"]
        choice = self.rng.choice(["checkpoint", "out", "dtype", "adapters"])
        if choice == "checkpoint":
            checkpoint = self.value()
        elif choice == "adapters":
            options.append("--adapters")
        else:
            options = [*options, f"--{choice}={self.value()}"]
        return Try(["export", *options, *self.rng.choice([[], ["--force"]]), "--", checkpoint])

    def ui(self) -> Try:
        # A store that is one is served until Ctrl-C.
        return Try(["ui", f"--{self.rng.choice(['store', 'port', 'experiment'])}={self.value()}", "--store=nowhere.db"])

    def sweep(self) -> Try:
        grid = self.rng.choice([self.value(), f"model.lrsa.top_k={self.value()}", f"{self.value()}=1", "a=1,2"])
        return Try(["sweep", *DEBUG, f"--grid={grid}", "--trainer.no=1"])

    def study(self) -> Try:
        action = self.rng.choice(["data", "run", "status", "config", "report", self.value()])
        return Try(["study", action, self.value(), *self.rng.choice([[], [f"--data={self.value()}"]])])

    def command(self) -> list[str]:
        return [self.rng.choice(["fit", "validate", "test", "predict"]), *DEBUG]

    def setting(self) -> Try:
        names = [f"{part}.{name}" for part, listed in SETTINGS.items() for name in listed.split()]
        name = self.rng.choice([*names, *["config", "ckpt_path", "seed_everything", "validate_first"] * 3])
        return Try([*self.command(), f"--{name}={self.value()}"])

    def names(self) -> Try:
        names = [f"{part}.{name}" for part, listed in SETTINGS.items() for name in listed.split()]
        name, place = self.rng.choice(names), self.rng.randrange(6)
        changed = self.rng.choice([name[:-1], name + "x", name.replace(".", ".."), name.upper(), name[place:]])
        return Try([*self.command(), self.rng.choice([f"--{changed}=1", f"--{changed}", f"-{changed}", changed])])

    def yaml(self) -> Try:
        content = self.rng.choice(YAML).encode("utf-8", "surrogatepass")
        content = self.rng.choice(
            [content] * 6 + [content.decode().encode("utf-16"), content + b"\xff", content + b"\0"]
        )
        if self.rng.random() < 0.3:
            names = [f"{part}.{name}" for part, listed in SETTINGS.items() for name in listed.split()]
            tree: Any = self.rng.choice(VALUES)
            for part in reversed(self.rng.choice(names).split(".")):
                tree = {part: tree}
            content = json.dumps(tree).encode()
        return Try([*self.command(), "--config", "x.yaml"], lambda: write("x.yaml", content), repr(content[:200]))

    def lines(self) -> Try:
        record = {"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}
        line = self.rng.choice([self.rng.choice(LINES), json.dumps(self.changed(record))])
        content = (json.dumps(record) + "\n" + line + "\n").encode("utf-8", "surrogatepass")
        content = self.rng.choice([content] * 4 + [content.decode().encode("utf-16"), content + b"\xff"])
        file = self.rng.choice(["x.jsonl", "x.json", "x.csv", "x.parquet"])
        command = [*self.command(), f"--data.init_args.{self.rng.choice(['train', 'val', 'test'])}={file}"]
        return Try(command, lambda: write(file, content), repr(content[-200:]))

    def json_file(self) -> Try:
        """A model's folder with a changed file."""
        name = self.rng.choice(
            ["config.json"] * 4 + ["tokenizer_config.json", "tokenizer.json", "generation_config.json"]
        )
        content = json.dumps(self.changed(json.loads(Path("model", name).read_text())))
        note = f"{name}: {self.note}"
        if self.rng.random() < 0.15:
            content = self.rng.choice(
                ["", "{", "[]", "null", "3", '{"a": 1}', "\ufeff{}", content[: len(content) // 2]]
            )
            note = f"{name}: {content[:60]!r}"

        def prepare() -> None:
            shutil.copytree("model", "changed")
            write(f"changed/{name}", content.encode())

        command = self.rng.choice(
            [ask_of("./changed", "text.txt", "Who?"), [*DEBUG, "--model.backbone.source=./changed"]]
        )
        return Try(command if command[0] == "ask" else [*self.command()[:1], *command], prepare, note)

    def checkpoint(self) -> Try:
        found = torch.load("fit.ckpt", weights_only=True)
        part = self.rng.choice([None, None, "lrsa_lit", "exact_state", "state_dict"])
        if part is None:
            found = self.changed(found)
        elif part == "state_dict":
            name = self.rng.choice(list(found[part]))
            change = self.rng.choice(["drop", "shape", "dtype", "value", "rename"])
            tensor = found[part].pop(name)
            new = {"shape": tensor[:1], "dtype": tensor.to(torch.complex64), "value": self.rng.choice(VALUES)}
            if change != "drop":
                found[part][name + ("x" if change == "rename" else "")] = new.get(change, tensor)
            self.note = f"{name}: {change}"
        else:
            found[part] = self.changed(found[part])
        command = self.rng.choice(
            [
                ask_of("x.ckpt", "text.txt", "Who?"),
                ["export", "x.ckpt", "--out", "new"],
                *[[name, *DEBUG, "--ckpt_path", "x.ckpt"] for name in ("fit", "test", "validate", "predict")],
            ]
        )
        return Try(command, lambda: torch.save(found, "x.ckpt"), f"x.ckpt: {part or ''} {self.note}")

    def changed(self, tree: Any) -> Any:
        """A copy in which one value somewhere is another one, or gone."""
        tree = copy.deepcopy(tree)
        place, names = tree, []
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = self.rng.choice(keys)
            names.append(key)
            if isinstance(place[key], dict | list) and place[key] and self.rng.random() < 0.7:
                place = place[key]
                continue
            if self.rng.random() < 0.3:
                del place[key]
                self.note = f"{names} deleted"
            else:
                place[key] = self.rng.choice(VALUES)
                self.note = f"{names} = {place[key]!r}"
            return tree
        self.note = "unchanged"
        return tree


DEBUG = ["--config=configs/debug/tiny.yaml", "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
DEBUG += ["--data.init_args.limit={train: 2, val: 1, test: 1}", "--data.init_args.max_tokens=400"]
DEBUG += ["--trainer.logger=false", "--validate_first=false", "--model.max_new_tokens=1"]


def ask_of(model: str, *rest: str) -> list[str]:
    return ["ask", "--model", model, "--max-new-tokens=1", *rest]


def write(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)


def materials() -> None:
    """What the tries read, in the working directory."""
    write("text.txt", b"The harbour was built in 1734.")
    write("utf16.txt", "The harbour.".encode("utf-16"))
    for name in ("junk.bin", "junk.ckpt", "junk.gguf", "junk.json"):
        write(name, random.Random(name).randbytes(5000))
    for name in ("folder", "folder.ckpt"):
        Path(name).mkdir()
    write("empty.ckpt", b"")
    os.symlink("loop", "loop")
    tiny_model().save_pretrained("model"), tiny_tokenizer().save_pretrained("model")
    record = {"id": "a", "passages": [{"title": "t", "text": "x"}], "question": "q", "answers": ["x"]}
    write("train.jsonl", json.dumps(record).encode())
    if (result := attempt(Try(["fit", *DEBUG]), 300)) is not None:
        sys.exit(f"the command that all others are made from fails: {result}")
    shutil.copy(next(Path().rglob("last.ckpt")), "fit.ckpt")
    shutil.rmtree("runs")


def attempt(tried: Try, seconds: float) -> str | None:
    """Run a command in a process of its own; what is wrong with how it ended, None for nothing."""
    if child := os.fork():
        return waited(child, seconds)
    try:
        os.setpgrp()
        for number, name in enumerate((os.devnull, "stdout", "stderr")):
            os.dup2(os.open(name, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sys.argv = ["lrsa", *tried.arguments]
        lrsa(tried.arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    with contextlib.suppress(Exception):
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def waited(child: int, seconds: float) -> str | None:
    end = time.monotonic() + seconds
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"took more than {seconds:.0f} s"
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(done[1])
    shown = Path("stderr").read_text(errors="replace").splitlines()
    if "Traceback (most recent call last):" in shown:
        frames = [line.strip() for line in shown if line.startswith("  File ")]
        ours = [frame for frame in frames if "lrsa_lit" in frame]
        return f"traceback: {shown[-1][:200]} [{(ours or frames)[-1]}]"
    errors = [line for line in shown if line.startswith("lrsa: error: ")]
    if code == 0:
        return None
    if code != 2 or len(errors) != 1 or shown[-1] != errors[0]:
        return f"code {code}, {len(errors)} error lines: {' / '.join(shown[-3:])[:300]}"
    return None


@contextlib.contextmanager
def fresh_folder(base: Path) -> Iterator[None]:
    """Work in a copy of the materials."""
    copied = base.with_name("try")
    shutil.copytree(base, copied, symlinks=True)
    os.chdir(copied)
    for name in ("pipe", "pipe.ckpt", "pipe.gguf"):
        os.mkfifo(name)
    try:
        yield
    finally:
        os.chdir(base)
        shutil.rmtree(copied)


def main() -> None:
    """Run the tries and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="most seconds of one try")
    parser.add_argument("--only", type=int, help="number of the one try to run")
    parser.add_argument("--json", type=Path, help="file for the counts and failures")
    options = parser.parse_args()
    out = options.json and options.json.absolute()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    failures: list[dict[str, Any]] = []
    ended: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        base.mkdir()
        os.chdir(base)
        os.environ.update(HOME=folder, LRSA_CACHE_DIR=f"{folder}/cache")
        torch.set_num_threads(1)
        materials()
        for number in range(options.tries) if options.only is None else [options.only]:
            with fresh_folder(base):
                # By the number, so that a try can be repeated alone.
                tried = Tries(random.Random(f"{options.seed}/{number}")).draw()
                tried.prepare()
                reason = attempt(tried, options.seconds)
            ended[tried.arguments[0]] = ended.get(tried.arguments[0], 0) + 1
            if reason is not None:
                shown = " ".join(each[:80] for each in tried.arguments if each not in DEBUG)
                failures.append({"number": number, "arguments": shown, "file": tried.note, "reason": reason})
                print(f"{number}: lrsa {shown!a}\n    {tried.note!a}\n    {reason!a}", flush=True)
        os.chdir("/")
    print(f"{sum(ended.values())} tries ({ended}), {len(failures)} failures")
    if out:
        counts = {"seed": options.seed, "tries": ended, "failures": failures}
        out.write_text(json.dumps(counts, indent=2) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
