"""Run a part of a study until it is done or the time is over."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lrsa_lit.attention.rules import base_of
from lrsa_lit.errors import UserError
from lrsa_lit.flops import kv_ratio
from lrsa_lit.study import tokens
from lrsa_lit.study.evaluation import Answers, evaluate, survival
from lrsa_lit.study.plan import Evaluation, Row, Study, Work, digest
from lrsa_lit.study.results import Line, Results
from lrsa_lit.study.tokens import TokenFile
from lrsa_lit.study.training import Meter, task_of, train
from lrsa_lit.tasks import LongContextQA

_SURVIVAL = 16
"""Questions whose selections are looked at."""

_SPARE = 15.0
"""Seconds that the end of a call may take: to write a checkpoint of a small model, and to leave."""


class OutOfTimeError(Exception):
    """The minutes are over; what is done is on the disk."""


class Runner:
    """Runs parts of a study on this machine.

    Args:
        study: the study.
        data: folder of the token files.
        out: file of the results.
        folder: where weights and unfinished trainings lie; they may be deleted at any time between two calls.
        seconds: after which nothing new is begun.
        source: where the base LLM lies on this machine; None: where the study says.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        study: Study,
        data: Path,
        out: Path,
        folder: Path,
        seconds: float,
        source: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study, self.data, self.folder, self.source, self.clock = study, data, folder, source, clock
        self.results = Results(out)
        self.until = clock() + seconds
        self._files: dict[tuple[str, str], TokenFile] = {}
        self._took: dict[str, float] = {}

    def run(self, part: str) -> bool:
        """Do what the results do not hold yet; returns whether the part is done."""
        try:
            for work in self.study.work(part):
                self._work(work)
        except OutOfTimeError:
            return False
        return True

    def left(self) -> float:
        """Seconds until nothing new may be begun."""
        return self.until - self.clock() - _SPARE

    def todo(self, part: str) -> list[tuple[Work, bool, list[Evaluation]]]:
        """For each row and seed whether it is trained, and the evaluations that are missing."""
        return [(work, self._trained(work), self._missing(work)) for work in self.study.work(part)]

    def _work(self, work: Work) -> None:
        missing = self._missing(work)
        if not missing and self._trained(work):
            return
        self._check_time("load")
        began = self.clock()
        task = task_of(work.row, self.source)
        if self._trained(work) and (self._weights(work).exists() or not work.row.steps):
            task.model = task.backbone.build()
            if work.row.steps:
                state = torch.load(self._weights(work), map_location="cpu", weights_only=True)
                task.model.load_state_dict(state, strict=work.row.settings["model"]["backbone"].get("lora") is None)
            self._took["load"] = self.clock() - began
        else:
            self._train(work, task)
        if missing:
            model = self._ready(task, work.row)
            for evaluation in missing:
                self._evaluate(work, task, model, evaluation)

    def _train(self, work: Work, task: LongContextQA) -> None:
        files = {name: self._file(name, "train") for name, weight in work.row.weights.items() if weight}
        checkpoint = self._weights(work).with_name("training.ckpt")
        _say(f"{work.row.name}, seed {work.seed}: training{' goes on' if checkpoint.exists() else ''}")
        if torch.cuda.is_available():
            # What an earlier row has left behind must not count.
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        meter, steps = train(work.row, work.seed, task, files, checkpoint, lambda: self.left() <= 0)
        if steps < work.row.steps:
            _say(f"{work.row.name}, seed {work.seed}: stopped at step {steps} of {work.row.steps}")
            raise OutOfTimeError
        _save(task, self._weights(work))
        self.results.append(self._training_line(work, meter))
        checkpoint.unlink(missing_ok=True)

    def _training_line(self, work: Work, meter: Meter) -> Line:
        speed = meter.tokens_per_second
        last = statistics.fmean(meter.losses[-20:])
        cuda = torch.cuda.is_available()
        _say(f"{work.row.name}, seed {work.seed}: trained, loss {last:.3f}, {speed or 0:,.0f} tokens/s")
        return {
            **self._about("training", work),
            "steps": work.row.steps,
            "loss_of_last_20_steps": last,
            "tokens_per_second": speed,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "settings": work.row.trained_by(),
        }

    def _evaluate(self, work: Work, task: LongContextQA, model: Any, item: Evaluation) -> None:
        timed = f"{item.data_set}/{item.split}"
        self._check_time(timed)
        file, began = self._file(item.data_set, item.split), self.clock()
        generates = self.study.data_sets[item.data_set].get("generate", True)
        new_tokens = task.max_new_tokens if generates else 0
        # Without an answer to generate, most positions are scored, each with a logit for each word.
        size = 8 if generates else 1
        answers = evaluate(model, task.tokenizer, file.examples, item.rule, max_new_tokens=new_tokens, batch_size=size)
        kept = survival(model, task.tokenizer, file.examples[:_SURVIVAL], item.rule) if generates else None
        self._took[timed] = self.clock() - began
        self.results.append(self._evaluation_line(work, item, file, answers, model) | {"survival": kept})
        shown = f"F1 {sum(answers.f1) / len(answers.f1):.3f}, " if answers.f1 else ""
        loss = sum(answers.loss) / sum(answers.tokens)
        _say(f"{work.row.name}, seed {work.seed}, {timed}, {item.name}: {shown}loss {loss:.3f}")

    def _evaluation_line(self, work: Work, item: Evaluation, file: TokenFile, answers: Answers, model: Any) -> Line:
        layers = model.config.get_text_config().num_hidden_layers
        length = sum(file.lengths) // len(file.lengths)
        return {
            **self._about("evaluation", work),
            "attention": item.name,
            "rule_digest": item.rule_digest,
            "rule": None if item.rule is None else item.rule.to_dict(),
            "layers": layers,
            "length": length,
            "kv_share": 1.0 if item.rule is None else kv_ratio(item.rule, length, layers),
            "set": item.data_set,
            "split": item.split,
            "set_digest": file.digest,
            "questions": len(file.examples),
            "dtype": str(model.dtype).removeprefix("torch."),
            "loss": _rounded(answers.loss),
            "tokens": answers.tokens,
            "f1": _rounded(answers.f1),
            "em": [int(value) for value in answers.em],
            "recall": _rounded(answers.recall),
            "text": answers.text,
        }

    def _about(self, kind: str, work: Work) -> Line:
        return {
            "kind": kind,
            "study": Path(self.study.name).stem,
            "row": work.row.name,
            **self._weights_key(work),
            "machine": _machine(),
        }

    def _weights_key(self, work: Work) -> Line:
        """What decides the weights of a row and seed."""
        return {"config": work.row.hash, "seed": work.seed, "train_digest": self._train_digest(work.row)}

    def _missing(self, work: Work) -> list[Evaluation]:
        key = self._weights_key(work)
        return [
            item
            for item in work.evaluations
            if not self.results.has(
                kind="evaluation",
                **key,
                rule_digest=item.rule_digest,
                set=item.data_set,
                split=item.split,
                set_digest=self._file(item.data_set, item.split).digest,
            )
        ]

    def _trained(self, work: Work) -> bool:
        """Whether there is nothing to train; the weights may be gone all the same."""
        return work.row.steps == 0 or self.results.has(kind="training", **self._weights_key(work))

    def _train_digest(self, row: Row) -> str:
        if row.steps == 0:
            return ""
        return digest({name: self._file(name, "train").digest for name, weight in row.weights.items() if weight})

    def _weights(self, work: Work) -> Path:
        return self.folder / "-".join(map(str, self._weights_key(work).values())) / "weights.pt"

    def _file(self, data_set: str, split: str) -> TokenFile:
        if (data_set, split) not in self._files:
            self._files[data_set, split] = tokens.read(tokens.path_of(self.data, data_set, split))
        return self._files[data_set, split]

    def _check_time(self, what: str) -> None:
        """Begin nothing that took longer the last time than what is left."""
        if self.left() <= self._took.get(what, 0.0) * 1.2:
            raise OutOfTimeError

    def _ready(self, task: LongContextQA, row: Row) -> Any:
        """The model for evaluation: on the device, and in the dtype that the training computed in."""
        model = base_of(task.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and str(row.settings["trainer"].get("precision")).startswith("bf16"):
            # The weights alone: rotary frequencies in bfloat16 would destroy long positions.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        return model.to(device).eval()


def _save(task: LongContextQA, path: Path) -> None:
    """Write the trained weights; the file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = task._trained({f"model.{name}": weight for name, weight in task.model.state_dict().items()})
    partial = path.with_suffix(".partial")
    try:
        torch.save({name.removeprefix("model."): weight for name, weight in weights.items()}, partial)
    except OSError as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise UserError(f"--work: {path.parent} cannot be written ({error})") from None
    os.replace(partial, path)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _machine() -> dict[str, str | None]:
    """Where and with what a result was made."""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "lightning")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "commit": os.environ.get("LRSA_COMMIT") or _commit(), **versions}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _say(text: str) -> None:
    print(text, flush=True)
