"""Run a part of a study until it is done or the time is over."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch

from lrsa_lit.checkpoints import AtomicCheckpointIO
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint import trained_weights
from lrsa_lit.models.flops import kv_ratio
from lrsa_lit.paths import check_writable
from lrsa_lit.study import machine, tokens
from lrsa_lit.study.plan import Evaluation, Row, Study, Work, digest
from lrsa_lit.study.results import Line, Results
from lrsa_lit.study.shards import Outcome, Weights, release, shard_size, shards_of
from lrsa_lit.study.tokens import TokenFile
from lrsa_lit.study.training import Meter, digest_of_weights, task_of, train
from lrsa_lit.study.workers import OutOfTimeError, Workers

_SPARE = 15.0
"""Seconds that the end of a call may take: to write a checkpoint of a small model, and to leave."""


class Runner:
    """Runs parts of a study on this machine.

    Args:
        study: the study.
        data: folder of the token files.
        out: file of the results.
        folder: where weights and unfinished trainings lie; they may be deleted at any time between two calls.
        seconds: after which nothing new is begun.
        source: where the base LLM lies on this machine; None: where the study says.
        workers: processes that evaluate, while nothing trains; 0 evaluates in this one.
        shared: whether others use the device as well, so that no speed is measured.
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
        workers: int = 0,
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study, self.data, self.folder, self.source, self.clock = study, data, folder, source, clock
        self.shared = shared
        self.results = Results(out)
        self.until = clock() + seconds
        self._files: dict[tuple[str, str], TokenFile] = {}
        self.workers = Workers(workers, self.left)

    def run(self, *parts: str, rows: Collection[str] = (), seeds: Collection[int] = ()) -> bool:
        """Do what the results do not hold yet, of some rows and seeds of the parts or of all; returns whether all is.

        Raises:
            UserError: the parts have no such row or seed, a row has a setting that is not allowed, or the results or
                weights cannot be written.
        """
        works = self.study.work(*parts)
        _check_among("--rows", rows, [work.row.name for work in works], parts)
        _check_among("--seeds", seeds, [work.seed for work in works], parts)
        chosen = [work for work in works if (not rows or work.row.name in rows) and (not seeds or work.seed in seeds)]
        for work in chosen:
            # Not when hours of trainings before it are over.
            self._check(work)
        try:
            with self.workers:
                for work in chosen:
                    self._work(work)
        except OutOfTimeError:
            return False
        return True

    def left(self) -> float:
        """Seconds until nothing new may be begun."""
        return self.until - self.clock() - _SPARE

    def todo(self, *parts: str) -> list[tuple[Work, bool, list[Evaluation]]]:
        """For each row and seed whether it is trained, and the evaluations that are missing."""
        return [(work, self._trained(work), self._missing(work)) for work in self.study.work(*parts)]

    def _work(self, work: Work) -> None:
        missing = self._missing(work)
        if not missing and self._trained(work):
            return
        if self.left() <= 0:
            raise OutOfTimeError
        self.results.check_writable()
        if work.row.steps:
            check_writable("--work", self.folder, self.folder)
        self._check_layers(work)
        if missing:
            self.workers.start()
        if work.row.steps and not self._at_hand(work):
            self._train(work)
            release()
            # Of other weights, as long as a training gives other bits each time, all results are missing.
            missing = self._missing(work)
        if missing:
            self._evaluate(work, missing)

    def _check(self, work: Work) -> None:
        try:
            task_of(work.row, self.source)
        except UserError as error:
            raise UserError(f"rows.{work.row.name}: {error}") from error

    def _check_layers(self, work: Work) -> None:
        """Refuse an evaluation that the row's model cannot do, before the training for it."""
        layers = task_of(work.row, self.source).backbone.config.num_hidden_layers
        for item in work.evaluations:
            try:
                if item.rule is not None:
                    item.rule.layers.check(layers)
            except UserError as error:
                raise UserError(f"inference.{item.name}: {error}") from None

    def _train(self, work: Work) -> None:
        files = {name: self._file(name, "train") for name in work.row.weights}
        checkpoint = self._place(work) / "training.ckpt"
        _say(f"{work.row.name}, seed {work.seed}: training{' goes on' if checkpoint.exists() else ''}")
        if torch.cuda.is_available():
            # What an earlier row has left behind must not count.
            release()
            torch.cuda.reset_peak_memory_stats()
        task = task_of(work.row, self.source)
        meter, steps, signalled = train(
            work.row, work.seed, task, files, checkpoint, lambda: self.left() <= 0, self.workers.settle
        )
        if steps < work.row.steps:
            _say(f"{work.row.name}, seed {work.seed}: stopped at step {steps} of {work.row.steps}")
            _obey(signalled)
            raise OutOfTimeError
        weights = trained_weights(task.backbone, task.model)
        found = digest_of_weights(weights)
        AtomicCheckpointIO().save_checkpoint(weights, self._place(work) / f"{found}.pt")
        self.results.append(self._training_line(work, meter, found))
        checkpoint.unlink(missing_ok=True)
        _obey(signalled)

    def _training_line(self, work: Work, meter: Meter, weights: str) -> Line:
        speed = None if self.shared else meter.tokens_per_second
        last = statistics.fmean(meter.losses[-20:])
        cuda = torch.cuda.is_available()
        shown = "" if speed is None else f", {speed:,.0f} tokens/s"
        _say(f"{work.row.name}, seed {work.seed}: trained, loss {last:.3f}{shown}")
        return {
            **self._about("training", work),
            "weights": weights,
            "steps": work.row.steps,
            "loss_of_last_20_steps": last,
            "tokens_per_second": speed,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "seconds": round(meter.wall, 1),
            "losses": _rounded(meter.losses),
            "settings": work.row.trained_by(),
        }

    def _evaluate(self, work: Work, missing: Sequence[Evaluation]) -> None:
        """Evaluate a row, and write each result as soon as it is there."""
        # Here, so that not every worker converts the base LLM on its first use.
        _ = task_of(work.row, self.source).backbone.location
        weights = Weights(work.row, self._weights(work), self.source)
        files = [self._file(item.data_set, item.split) for item in missing]
        size = shard_size(sum(len(file.examples) for file in files), self.workers.count)
        shards = [
            shards_of(
                weights,
                item.rule,
                tokens.path_of(self.data, item.data_set, item.split),
                len(file.examples),
                size,
                generates=item.generates,
                whole_text=not self.study.generates(item.data_set),
            )
            for item, file in zip(missing, files, strict=True)
        ]
        for number, outcome in self.workers.run(shards):
            item, answers = missing[number], outcome.answers.placed(files[number].by_length)
            self.results.append(self._evaluation_line(work, item, files[number], outcome._replace(answers=answers)))
            shown = f"F1 {statistics.fmean(answers.f1):.3f}, " if answers.f1 else ""
            loss = sum(answers.loss) / sum(answers.tokens)
            _say(
                f"{work.row.name}, seed {work.seed}, {item.data_set}/{item.split}, {item.name}: {shown}loss {loss:.3f}"
            )

    def _evaluation_line(self, work: Work, item: Evaluation, file: TokenFile, outcome: Outcome) -> Line:
        answers, layers = outcome.answers, outcome.layers
        length = sum(file.lengths) // len(file.lengths)
        return {
            **self._about("evaluation", work),
            "weights": self._digest(work),
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
            "contexts": file.contexts,
            "dtype": outcome.dtype,
            "generated": item.generates,
            "loss": _rounded(answers.loss),
            "tokens": answers.tokens,
            "f1": _rounded(answers.f1),
            "em": [int(value) for value in answers.em],
            "recall": _rounded(answers.recall),
            "text": answers.text,
            "survival": outcome.survival,
            # Of the machine, which all workers share.
            "seconds": round(outcome.seconds / max(self.workers.count, 1), 1),
        }

    def _about(self, kind: str, work: Work) -> Line:
        return {
            "kind": kind,
            "study": Path(self.study.name).stem,
            "row": work.row.name,
            **self._trained_by(work),
            "machine": machine.describe() | ({"shared": "yes"} if self.shared else {}),
        }

    def _trained_by(self, work: Work) -> Line:
        """What a training of a row and seed depends on."""
        return {"config": work.row.hash, "seed": work.seed, "train_digest": self._train_digest(work.row)}

    def _missing(self, work: Work) -> list[Evaluation]:
        return [item for item in work.evaluations if not self._evaluated(work, item)]

    def _evaluated(self, work: Work, item: Evaluation) -> bool:
        """Whether there is a result; one with answers has the losses too."""
        asked = {
            "kind": "evaluation",
            **self._trained_by(work),
            "weights": self._digest(work),
            "rule_digest": item.rule_digest,
            "set": item.data_set,
            "split": item.split,
            "set_digest": self._file(item.data_set, item.split).digest,
        }
        return any(self.results.has(**asked, generated=generated) for generated in {item.generates, True})

    def _trained(self, work: Work) -> bool:
        """Whether there is nothing to train; the weights may be gone all the same."""
        return work.row.steps == 0 or self.results.weights_of(**self._trained_by(work)) is not None

    def _digest(self, work: Work) -> str:
        """Of the last weights of a row and seed; empty for the base LLM, and where there are none."""
        return self.results.weights_of(**self._trained_by(work)) or ""

    def _train_digest(self, row: Row) -> str:
        if row.steps == 0:
            return ""
        return digest({name: self._file(name, "train").digest for name in row.weights})

    def _place(self, work: Work) -> Path:
        return self.folder / "-".join(map(str, self._trained_by(work).values()))

    def _weights(self, work: Work) -> Path | None:
        """The file of the last weights; None where the base LLM is asked for, or no training says which they are."""
        digest = self._digest(work)
        return self._place(work) / f"{digest}.pt" if digest else None

    def _at_hand(self, work: Work) -> bool:
        weights = self._weights(work)
        return weights is not None and weights.exists()

    def _file(self, data_set: str, split: str) -> TokenFile:
        if (data_set, split) not in self._files:
            self._files[data_set, split] = tokens.read(tokens.path_of(self.data, data_set, split))
        return self._files[data_set, split]


def _obey(signalled: int | None) -> None:
    """End as Ctrl-C or SIGTERM asks for, now that what was trained until then is on the disk."""
    if signalled == signal.SIGTERM:
        raise SystemExit(143)
    if signalled is not None:
        raise KeyboardInterrupt


def _check_among(option: str, asked: Iterable[str | int], works: Iterable[str | int], parts: Iterable[str]) -> None:
    allowed = dict.fromkeys(works)
    if unknown := [value for value in asked if value not in allowed]:
        raise UserError(
            f"{option}: {unknown[0]!r} is not allowed; {', '.join(parts)} has {', '.join(map(str, allowed))}"
        )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _say(text: str) -> None:
    print(text, flush=True)
