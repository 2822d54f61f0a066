"""Batches and compiled layers of a study's training."""

import dataclasses
import functools

import pytest
import torch
import yaml
from study.conftest import STUDY

from lrsa_lit.study import settings, tokens
from lrsa_lit.study.plan import Study
from lrsa_lit.study.runner import Runner
from lrsa_lit.study.training import Batches, task_of


@pytest.fixture
def compiled_study(study_file) -> Study:
    changes = {"model": {"backbone": {"compile_layers": True}}}
    study_file.write_text(yaml.safe_dump(settings.merged(STUDY, changes), sort_keys=False))
    return Study(str(study_file))


def test_batches_of_compiled_layers_have_one_length_and_the_same_losses(compiled_study, data):
    files = {"plain": tokens.read(tokens.path_of(data, "plain", "train"))}
    row = compiled_study.row("lrsa")
    eager = settings.merged(row.settings, {"model": {"backbone": {"compile_layers": False}}})
    task = task_of(row)
    task.configure_model()
    lengths = {"padded": set(), "plain": set()}
    padded, plain = (Batches(files, made, 0, task.tokenizer.pad_token_id)
                     for made in (row, dataclasses.replace(row, settings=eager)))  # fmt: skip
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _, one, other in zip(range(3), padded, plain, strict=False):
            lengths["padded"].add(one["input_ids"].shape[1])
            lengths["plain"].add(other["input_ids"].shape[1])
            torch.testing.assert_close(task.answer_loss(one), task.answer_loss(other))
    assert len(lengths["padded"]) == 1 < len(lengths["plain"])
    assert max(files["plain"].lengths) <= min(lengths["padded"])


def test_layers_are_compiled_once_whatever_the_batch_the_rule_and_its_k(compiled_study, data, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for row in ("lrsa", "mixed", "dense"):
        for seed in (0, 1):
            work = next(work for part in ("main", "all") for work in compiled_study.work(part) if work.row.name == row)
            runner = Runner(compiled_study, data, tmp_path / "results.jsonl", tmp_path / "work", 1e6)
            runner._work(work._replace(seed=seed, evaluations=[]))
            graphs.append(counters["stats"]["unique_graphs"])
    sparse, dense = graphs[:4], graphs[4:]
    assert len(set(sparse)) == len(set(dense)) == 1 <= sparse[0] < dense[0]
