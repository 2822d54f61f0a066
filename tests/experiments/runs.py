"""Runners of the tiny study, with real commands or made-up ones."""

from experiments.executors import Fabricated

from lrsa_lit.cli.study import open_study
from lrsa_lit.experiments.questions import Questions
from lrsa_lit.experiments.results import Results, read_lines
from lrsa_lit.experiments.runner import Runner

KL = {"class_path": "lrsa_lit.objectives.Distillation", "init_args": {"teacher": {"row": "dense"}, "positions": 20}}
FEW = {"rows": ["lrsa"], "seeds": [0], "inference": ["own"], "sets": ["plain"]}
NO_LOGGER = {"trainer": {"logger": False}}


def runner(study_file, data, tmp_path, out="results.jsonl", **options):
    study = open_study(str(study_file))
    results = Results(tmp_path / out, study)
    return Runner(study, Questions(study, data), results, tmp_path / "work", **options)


def fabricated(study_file, data, tmp_path, *parts, out="results.jsonl", rows=(), **options):
    """The lines of some parts whose commands are no real ones, and which commands these were."""
    run = runner(study_file, data, tmp_path, out, overlay=NO_LOGGER)
    executor = Fabricated(run.questions, **options)
    assert run.run(run.chosen(parts, rows), executor) != bool(run.failed)
    return read_lines(tmp_path / out), executor.ran
