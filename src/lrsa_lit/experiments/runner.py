"""Run the parts of a study that have no results yet, with the same commands that users have."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lrsa_lit.errors import UserError
from lrsa_lit.experiments import before_training, commands
from lrsa_lit.experiments.commands import CHECKPOINT, RECORD, answers_of
from lrsa_lit.experiments.jobs import Executor, Job, OutOfTimeError, Unit
from lrsa_lit.experiments.parent_run import PARENT, STUDY, Record
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.results import Line, Results, evaluation_lines, training_line
from lrsa_lit.experiments.study import Evaluation, Row, Settings, Study, Work, digest
from lrsa_lit.paths import check_writable

ATTENTIONS_AT_ONCE = 4
"""Maximum number of attentions per command; a command that is stopped loses all its results."""


@dataclass
class Runner:
    """Runs parts of a study.

    Attributes:
        study: the study.
        questions: the study's data.
        results: earlier results, and the file for new ones.
        folder: folder of weights, unfinished trainings and answers; it may be deleted between two calls.
        overlay: settings that override all others but do not affect results, such as the local path of the base LLM.
        shared: whether other processes also use the device, so that no speed is recorded.
        workers: number of processes that share a device in an evaluation.
        failed: one line for each failure.
    """

    study: Study
    questions: Questions
    results: Results
    folder: Path
    overlay: Settings = field(default_factory=dict)
    shared: bool = False
    workers: int = 1
    failed: list[str] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)

    def chosen(self, parts: Sequence[str], rows: Collection[str] = (), seeds: Collection[int] = ()) -> list[Work]:
        """The work of parts, for all or selected rows and seeds.

        Raises:
            UserError: the parts do not have a selected row or seed.
        """
        works = self.study.work(*parts)
        names, numbers = {work.row.name: None for work in works}, {work.seed: None for work in works}
        for option, asked, known in (("--rows", rows, names), ("--seeds", seeds, numbers)):
            if unknown := [value for value in asked if value not in known]:
                told = f"is not allowed; {', '.join(parts)} has {', '.join(map(str, known))}"
                raise UserError(option, unknown[0], reason=told)
        return [work for work in works if (not rows or work.row.name in rows) and (not seeds or work.seed in seeds)]

    def todo(self, works: Iterable[Work]) -> Iterator[tuple[Work, bool, list[Evaluation]]]:
        """For each row and seed: whether the training is done, and the missing evaluations."""
        for work in works:
            trained = self.results.weights_of(self._trained_by(work)) is not None
            yield work, work.row.steps == 0 or trained, self._missing(work)

    def run(self, works: Sequence[Work], executor: Executor) -> bool:
        """Do all work that has no results yet; return whether everything is done.

        Raises:
            UserError: the results or weights cannot be written, or the data cannot be made.
            KeyboardInterrupt: Ctrl-C; the commands have saved their state.
        """
        todo = [work for work, trained, missing in self.todo(works) if not trained or missing]
        if not todo:
            return True
        self.results.check_writable()
        check_writable("--work", self.folder, self.folder)
        stages = self._stages(todo)
        before_training.check(self.study, [work for stage in stages for work in stage], self._settings)
        record, trainer = None, self._settings(todo[0].row)["trainer"]
        with contextlib.ExitStack() as ends:
            if trainer.get("logger"):
                record = Record(trainer, STUDY, self.study.title, self.study.title, {})
                ends.enter_context(record.running(self.failed))
                ends.callback(record.keep, self.results.path)
            try:
                for stage in stages:
                    units = [self._unit(work, record) for work in stage]
                    executor.drive(units, record.beat if record else lambda: None)
            except OutOfTimeError:
                return False
        return not self.failed

    def _stages(self, works: list[Work]) -> list[list[Work]]:
        """Stages of work: the given work last, preceded by the trainings that it needs, recursively."""
        stages = [works]
        while before := self._needed(stages[0]):
            stages.insert(0, before)
        return stages

    def _needed(self, works: Sequence[Work]) -> list[Work]:
        """The missing trainings of other rows that ``works`` depend on."""
        asked = {(other.row.hash, other.seed): other for work in works if not self._at_hand(work)
                 for other in _before(work)}  # fmt: skip
        return [other for other in asked.values() if not self._at_hand(other)]

    def _unit(self, work: Work, record: Record | None) -> Unit:
        """Train a row unless its weights are available; the evaluations follow."""
        row, folder = work.row, self._folder(work)
        if not self._at_hand(work):
            before = _before(work)
            if lacking := [other.row.name for other in before if not self._at_hand(other)]:
                self._fail(work, f"row {lacking[0]}, which it needs, is not trained")
                return None
            _say(work, f"training{' resumes' if (folder / CHECKPOINT).exists() else ''}")
            if (folder / RECORD).exists():
                # The record belongs to weights that are lost or that the results do not know.
                shutil.rmtree(folder)
            checkpoints = {other.row.name: str(self._folder(other) / CHECKPOINT) for other in before}
            command = partial(commands.fit, self.study, row, work.seed, folder, self.overlay, checkpoints)
            if code := (yield self._job(work, record, command)):
                self._fail(work, f"the training failed (exit code {code})")
                return None
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            self._keep(work, [training_line(self._about(work), found, row.trained_by())])
        return [self._evaluation(work, group, record) for group in _groups(self._missing(work))]

    def _evaluation(self, work: Work, group: Sequence[Evaluation], record: Record | None) -> Unit:
        """Evaluate a row under some attentions, by one command."""
        folder, layers = self._folder(work), self._layers(work.row)
        command = partial(commands.evaluation, self.study, work.row, group, folder, self.overlay, layers, self.workers)
        if code := (yield self._job(work, record, command)):
            names = ", ".join(item.name for item in group)
            self._fail(work, f"{group[0].data_set} under {names}: the evaluation failed (exit code {code})")
        else:
            weights = self.results.weights_of(self._trained_by(work)) or ""
            self._keep(work, evaluation_lines(self._about(work), weights, group, answers_of(group, folder)))
        return None

    def _job(self, work: Work, record: Record | None, command: Callable[[], list[str]]) -> Job:
        tags = {"study.row": work.row.name, "study.config": work.row.hash}
        tags |= {PARENT: record.run_id} if record else {}
        return Job(command, tags, self.questions.environment, self._settings(work.row)["trainer"])

    def _fail(self, work: Work, text: str) -> None:
        _say(work, text)
        self.failed.append(f"{work.row.name}, seed {work.seed}: {text}")

    def _keep(self, work: Work, lines: Sequence[Line]) -> None:
        for line in lines:
            if line["kind"] == "evaluation":
                name = f"{line['set']}/{line['split']}"
                expected, found = self.questions.facts(line["set"], line["split"]).digest, line["set_digest"]
                if found != expected:
                    reason = f"the examples of {name} have changed from {expected} to {found}"
                    raise UserError("--data", reason=reason, hint="run `lrsa study data` again")
                f1 = f"F1 {statistics.fmean(line['f1']):.3f}, " if line["generated"] else ""
                told = f"{name}, {line['attention']}: {f1}loss {sum(line['loss']) / sum(line['tokens']):.3f}"
                if self.shared and line["measured"]:
                    measured = line["measured"].items()
                    line["measured"] = {key: value for key, value in measured if not key.endswith("seconds")}
            else:
                line["tokens_per_second"] = speed = None if self.shared else line["tokens_per_second"]
                told = f"trained, loss {line['loss_of_last_20_steps']:.3f}"
                told += "" if speed is None else f", {speed:,.0f} tokens/s"
            line["machine"] |= {"shared": "yes"} if self.shared else {}
            self.results.append(line)
            _say(work, told)

    def _settings(self, row: Row) -> Settings:
        """The settings of the row's commands on this machine."""
        root = {"trainer": {"default_root_dir": str(self.folder)}}
        layers = row.layers({other.name: other.hash for other in row.needs})
        return self.study.fit_settings.given(self.study.arguments, [*layers, root, self.overlay])

    def _layers(self, row: Row) -> int:
        """The number of layers of the row's model."""
        from lrsa_lit.models import Backbone

        settings = self._settings(row)["model"]["backbone"]
        if (key := digest(settings)) not in self._counts:
            made = self.study.fit_settings.made(f"rows.{row.name}.model.backbone", Backbone, settings)
            self._counts[key] = made.config.num_hidden_layers
        return self._counts[key]

    def _about(self, work: Work) -> Line:
        return {"study": self.study.title, "row": work.row.name, **self._trained_by(work)}

    def _trained_by(self, work: Work) -> Line:
        """The fields that identify the training of a row and seed."""
        data = {name: self.questions.facts(name, "train").digest for name in work.row.train_sets}
        return {"config": work.row.hash, "seed": work.seed, "train_digest": digest(data) if data else ""}

    def _missing(self, work: Work) -> list[Evaluation]:
        trained, settings = self._trained_by(work), work.row.settings

        def is_there(item: Evaluation) -> bool:
            facts = self.questions.facts(item.data_set, item.split)
            return self.results.has(trained, item, facts.digest, self.study.new_tokens(item.data_set, settings))

        return [item for item in work.evaluations if not is_there(item)]

    def _folder(self, work: Work) -> Path:
        """The folder of a row and seed's checkpoint and answers."""
        return self.folder / "-".join(map(str, self._trained_by(work).values()))

    def _at_hand(self, work: Work) -> bool:
        """Whether there is nothing to train, or the checkpoint has the weights that the results name."""
        if work.row.steps == 0:
            return True
        folder = self._folder(work)
        if not (folder / RECORD).exists() or not (folder / CHECKPOINT).exists():
            return False
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))["weights"]
        return bool(found == self.results.weights_of(self._trained_by(work)))


def _before(work: Work) -> list[Work]:
    """The trainings, with the same seed, of the rows that a row needs."""
    return [Work(row, work.seed, []) for row in work.row.needs]


def _groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Groups of evaluations for one command each: same questions, all with or all without answers."""
    groups: dict[tuple[str, str, bool], list[Evaluation]] = {}
    for item in evaluations:
        groups.setdefault((item.data_set, item.split, item.generates), []).append(item)
    size = ATTENTIONS_AT_ONCE
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _say(work: Work, text: str) -> None:
    print(f"{work.row.name}, seed {work.seed}: {text}", flush=True)
