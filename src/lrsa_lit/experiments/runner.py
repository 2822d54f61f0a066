"""Run parts of a study: what their results do not hold yet, by the commands that users have."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lrsa_lit.errors import UserError, under
from lrsa_lit.experiments import commands
from lrsa_lit.experiments.commands import ATTENTIONS_AT_ONCE, Place
from lrsa_lit.experiments.jobs import Executor, Job, OutOfTimeError, Unit
from lrsa_lit.experiments.parent_run import PARENT, STUDY, Record
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.results import Line, Results
from lrsa_lit.experiments.settings import Settings, digest
from lrsa_lit.experiments.study import Evaluation, Row, Study, Work
from lrsa_lit.paths import check_writable


class Runner:
    """Runs parts of a study.

    Args:
        study: the study.
        questions: its data.
        results: what was found before, and where to write.
        folder: where weights, unfinished trainings and answers lie; it may be deleted at any time between two calls.
        overlay: settings over all others, which decide no results, such as where the base LLM lies on this machine.
        shared: whether others use the device as well, so that no speed is recorded.
        workers: processes that share a device in an evaluation.

    Attributes:
        failed: what has failed, in a line each.
    """

    def __init__(
        self,
        study: Study,
        questions: Questions,
        results: Results,
        folder: Path,
        overlay: Settings | None = None,
        *,
        shared: bool = False,
        workers: int = 1,
    ) -> None:
        self.study, self.questions, self.results, self.folder = study, questions, results, folder
        self.overlay, self.shared, self.workers = overlay or {}, shared, workers
        self.failed: list[str] = []

    def chosen(self, parts: Sequence[str], rows: Collection[str] = (), seeds: Collection[int] = ()) -> list[Work]:
        """The work of parts, of some of their rows and seeds or of all.

        Raises:
            UserError: the parts have no such row or seed.
        """
        works = self.study.work(*parts)
        _check_among("--rows", rows, [work.row.name for work in works], parts)
        _check_among("--seeds", seeds, [work.seed for work in works], parts)
        return [work for work in works if (not rows or work.row.name in rows) and (not seeds or work.seed in seeds)]

    def run(self, works: Sequence[Work], executor: Executor) -> bool:
        """Do what the results do not hold yet; returns whether all of it is done.

        Raises:
            UserError: the results or weights cannot be written, or the data cannot be made.
            KeyboardInterrupt: Ctrl-C, after which the commands have saved what they had.
        """
        todo = [work for work in works if not self._is_done(work)]
        if not todo:
            return True
        self.results.check_writable()
        check_writable("--work", self.folder, self.folder)
        for work in todo:
            self._check(work)
        trainer = self._settings(todo[0].row)["trainer"]
        if not trainer.get("logger"):
            return self._drive(todo, executor, None)
        record = Record(trainer, STUDY, self.study.title, self.study.title, {})
        with record.running() as ending:
            try:
                done = self._drive(todo, executor, record)
            finally:
                ending.well = not self.failed
                if self.results.path.exists():
                    record.keep(self.results.path)
        return done

    def prepare(self, works: Iterable[Work]) -> None:
        """Tokenise what some work needs and the folder of the data does not have."""
        trained = [(name, "train") for work in works if work.row.steps for name in work.row.weights]
        asked = [(item.data_set, item.split) for work in works for item in work.evaluations]
        self.questions.prepare([*trained, *asked])

    def todo(self, works: Iterable[Work]) -> Iterator[tuple[Work, bool, list[Evaluation]]]:
        """For each row and seed whether it is trained, and the evaluations that are missing."""
        for work in works:
            yield work, self._is_trained(work), self._missing(work)

    def _drive(self, works: Sequence[Work], executor: Executor, record: Record | None) -> bool:
        try:
            executor.drive([self._unit(work, record) for work in works], record.beat if record else lambda: None)
        except OutOfTimeError:
            return False
        return not self.failed

    def _unit(self, work: Work, record: Record | None) -> Unit:
        """Train a row unless its weights are at hand, then evaluate it."""
        place = self._place(work)
        if work.row.steps and not self._at_hand(work):
            _say(work, f"training{' goes on' if place.checkpoint.exists() else ''}")
            if place.record.exists():
                # Of weights that are gone, or that the results do not know.
                shutil.rmtree(place.folder)
            told = partial(commands.fit, self.study, work.row, work.seed, place, self.overlay)
            code = yield self._job(work, record, told)
            if code:
                self._fail(work, f"the training failed (exit code {code})")
                return
            self._keep_training(work)
        for group in _groups(self._missing(work)):
            told = partial(commands.evaluation, self.study, work.row, group, place, self.overlay, self.workers)
            code = yield self._job(work, record, told)
            if code:
                names = ", ".join(item.name for item in group)
                self._fail(work, f"{group[0].data_set} under {names}: the evaluation failed (exit code {code})")
            else:
                self._keep_answers(work, group)

    def _fail(self, work: Work, text: str) -> None:
        _say(work, text)
        self.failed.append(f"{work.row.name}, seed {work.seed}: {text}")

    def _job(self, work: Work, record: Record | None, command: Callable[[], list[str]]) -> Job:
        tags = {"study.row": work.row.name, "study.config": work.row.hash}
        tags |= {PARENT: record.run_id} if record else {}
        return Job(command, tags, self.questions.environment, self._settings(work.row)["trainer"])

    def _check(self, work: Work) -> None:
        """Refuse what the classes of a row refuse, and an attention that its model cannot have, before any training."""
        from lrsa_lit.data.module import QADataModule
        from lrsa_lit.models import Backbone

        made, settings = self.study.fit_settings.made, self._settings(work.row)
        if work.row.steps:
            made(f"rows.{work.row.name}.data", QADataModule, settings["data"])
        backbone = made(f"rows.{work.row.name}.model.backbone", Backbone, settings["model"]["backbone"])
        layers = backbone.config.num_hidden_layers
        for item in work.evaluations:
            if item.rule is not None:
                with under(f"inference.{item.name}"):
                    item.rule.layers.check(layers)

    def _settings(self, row: Row) -> Settings:
        """What is given to the row's commands on this machine."""
        root = {"trainer": {"default_root_dir": str(self.folder)}}
        overlays = [self.study.overlay, row.overlay, root, self.overlay]
        return self.study.fit_settings.given(self.study.arguments, overlays)

    def _keep_training(self, work: Work) -> None:
        found = json.loads(self._place(work).record.read_text(encoding="utf-8"))
        speed = None if self.shared else found["tokens_per_second"]
        last = statistics.fmean(found["losses"][-20:])
        self.results.append(
            {
                **self._about("training", work, found["machine"]),
                "weights": found["weights"],
                "steps": work.row.steps,
                "loss_of_last_20_steps": last,
                "tokens_per_second": speed,
                "peak_memory_bytes": found["peak_memory_bytes"],
                "seconds": found["seconds"],
                "losses": _rounded(found["losses"]),
                "settings": work.row.trained_by(),
            }
        )
        _say(work, f"trained, loss {last:.3f}{'' if speed is None else f', {speed:,.0f} tokens/s'}")

    def _keep_answers(self, work: Work, group: Sequence[Evaluation]) -> None:
        """Write a line for each attention that a command has evaluated."""
        path = self._place(work).answers(group)
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        (part,) = about["data_sets"].values()
        first = group[0]
        expected = self.questions.facts(first.data_set, first.split).digest
        if part["set_digest"] != expected:
            raise UserError(
                "--data",
                reason=f"the examples of {first.data_set}/{first.split} have changed from {expected} to "
                f"{part['set_digest']}; run `lrsa study data` again",
            )
        names = {rule["rule_digest"]: name for name, rule in reversed(about["attentions"].items())}
        for item in group:
            self.results.append(self._evaluation_line(work, item, about, part, answers, names[item.rule_digest]))

    def _evaluation_line(
        self, work: Work, item: Evaluation, about: Settings, part: Settings, answers: Sequence[Settings], name: str
    ) -> Line:
        found = [{**line[name], "tokens": line["answer_tokens"]} for line in answers]
        line = {
            **self._about("evaluation", work, about["machine"]),
            "weights": self._weights(work),
            "attention": item.name,
            "rule_digest": item.rule_digest,
            "rule": None if item.rule is None else item.rule.to_dict(),
            "layers": about["layers"],
            "length": part["length"],
            "kv_share": part["kv_share"][name],
            "set": item.data_set,
            "split": item.split,
            "set_digest": part["set_digest"],
            "questions": part["questions"],
            "contexts": part["contexts"],
            "dtype": about["dtype"],
            "generated": item.generates,
            "loss": _rounded([each["loss"] for each in found]),
            "tokens": [each["tokens"] for each in found],
            "f1": _rounded([each["f1"] for each in found if item.generates]),
            "em": [int(each["exact_match"]) for each in found if item.generates],
            "recall": _rounded([each["recall"] for each in found if item.generates]),
            "text": [each["prediction"] for each in found if item.generates],
            "survival": (about.get("survival", {}).get(name) or {}).get(""),
            "seconds": round(about["seconds"] / len(about["attentions"]), 1),
        }
        f1 = f"F1 {statistics.fmean(line['f1']):.3f}, " if item.generates else ""
        loss = sum(line["loss"]) / sum(line["tokens"])
        _say(work, f"{item.data_set}/{item.split}, {item.name}: {f1}loss {loss:.3f}")
        return line

    def _about(self, kind: str, work: Work, machine: Settings) -> Line:
        return {
            "kind": kind,
            "study": self.study.title,
            "row": work.row.name,
            **self._trained_by(work),
            "machine": machine | ({"shared": "yes"} if self.shared else {}),
        }

    def _trained_by(self, work: Work) -> Line:
        """What a training of a row and seed depends on."""
        return {"config": work.row.hash, "seed": work.seed, "train_digest": self._train_digest(work.row)}

    def _is_done(self, work: Work) -> bool:
        return self._is_trained(work) and not self._missing(work)

    def _missing(self, work: Work) -> list[Evaluation]:
        return [item for item in work.evaluations if not self._is_evaluated(work, item)]

    def _is_evaluated(self, work: Work, item: Evaluation) -> bool:
        """Whether there is a result; one with answers has the losses too."""
        asked = {
            "kind": "evaluation",
            **self._trained_by(work),
            "weights": self._weights(work),
            "rule_digest": item.rule_digest,
            "set": item.data_set,
            "split": item.split,
            "set_digest": self.questions.facts(item.data_set, item.split).digest,
        }
        return any(self.results.has(**asked, generated=generated) for generated in {item.generates, True})

    def _is_trained(self, work: Work) -> bool:
        """Whether there is nothing to train; the weights may be gone all the same."""
        return work.row.steps == 0 or self.results.weights_of(**self._trained_by(work)) is not None

    def _weights(self, work: Work) -> str:
        """Digest of the last weights of a row and seed; empty for the base LLM, and where there are none."""
        return self.results.weights_of(**self._trained_by(work)) or ""

    def _at_hand(self, work: Work) -> bool:
        """Whether the checkpoint is that of the weights which the results name."""
        place = self._place(work)
        if not place.record.exists() or not place.checkpoint.exists():
            return False
        return bool(json.loads(place.record.read_text(encoding="utf-8"))["weights"] == self._weights(work))

    def _train_digest(self, row: Row) -> str:
        if row.steps == 0:
            return ""
        return digest({name: self.questions.facts(name, "train").digest for name in row.weights})

    def _place(self, work: Work) -> Place:
        return Place(self.folder, "-".join(map(str, self._trained_by(work).values())))


def _groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """What one command evaluates: attentions on the same questions, with answers or without."""
    groups: dict[tuple[str, str, bool], list[Evaluation]] = {}
    for item in evaluations:
        groups.setdefault((item.data_set, item.split, item.generates), []).append(item)
    size = ATTENTIONS_AT_ONCE
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _check_among(option: str, asked: Iterable[str | int], works: Iterable[str | int], parts: Iterable[str]) -> None:
    allowed = dict.fromkeys(works)
    if unknown := [value for value in asked if value not in allowed]:
        raise UserError(
            option, unknown[0], reason=f"is not allowed; {', '.join(parts)} has {', '.join(map(str, allowed))}"
        )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _say(work: Work, text: str) -> None:
    print(f"{work.row.name}, seed {work.seed}: {text}", flush=True)
