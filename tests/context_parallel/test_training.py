"""Devices that share rows train what one process trains: with every objective, padded and packed, with adapters.

Two processes share a row; of four, two share each row and all four share the weights.
"""

import functools
import os
from types import SimpleNamespace

import lightning
import processes
import pytest
import torch
from helpers import quiet_trainer
from objective_helpers import RULE, example
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lrsa_lit.attention import enable
from lrsa_lit.data.collate import collate_packed, collate_training
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer
from lrsa_lit.objectives import AnswerLoss, Distillation, HiddenAlignment, LanguageModelLoss, Sum
from lrsa_lit.ops.sparse_attention import MeanPool
from lrsa_lit.strategies import FullySharded
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tasks.shared_batch import inputs_of, shared_rows

pytestmark = pytest.mark.slow

EXAMPLES = [example(70, 3, "a"), example(141, 6, "b"), example(195, 1, "c"), example(160, 4, "d")]
# The batches of two steps, one for each context group: a long answer lies in several shares.
STEPS = [([1], [2, 3]), ([3, 1], [0, 2])]
PLAIN, LORA = {}, {"lora": LoRA(rank=2), "gradient_checkpointing": True}
TAUGHT = {"teacher": "./teacher", "teacher_dtype": "float32"}
CASES = {
    "answers": (PLAIN, RULE, collate_training, lambda: AnswerLoss(per="answer")),
    "packed": (PLAIN, RULE, collate_packed, lambda: LanguageModelLoss(share=0.5)),
    "everything": (LORA, RULE, collate_packed, lambda: Sum([
        AnswerLoss(), Distillation(positions=30, weight=0.7), HiddenAlignment(positions=9, weight=2.0)])),
    "another model teaches": (PLAIN, RULE.replace(compressor=MeanPool(), dense_layers=(0,)), collate_training,
                              lambda: Distillation(positions=30, **TAUGHT)),
    "dense": (PLAIN, None, collate_packed, AnswerLoss),
}  # fmt: skip


BATCH = collate_packed(EXAMPLES)


def trained(name, groups, strategy="auto", **options):
    """What two steps change in what is trained, and the losses shown, of the batches of some context groups."""
    backbone, rule, collate, objective = CASES[name]
    made = collate if collate is collate_packed else functools.partial(collate, pad_token_id=2)
    batches = []
    for step in STEPS:
        chosen = [EXAMPLES[place] for group in groups for place in step[group]]
        of_step = [EXAMPLES[place] for group in options.get("of", groups) for place in step[group]]
        batches.append({**made(chosen), "step_sizes": collate_packed(of_step)["sizes"]})
    lightning.seed_everything(3, verbose=False)
    task = LongContextQA(Backbone("tiny", **backbone), rule or RULE, functools.partial(torch.optim.SGD, lr=0.1),
                         objective=objective(), train_attention=None if rule is None else {})  # fmt: skip
    trainer = quiet_trainer(max_epochs=1, use_distributed_sampler=False, strategy=strategy,
                            devices=options.get("devices", 1), inference_mode=False)  # fmt: skip
    shown = []
    task.on_train_batch_end = lambda *_: shown.append(float(trainer.callback_metrics["train/loss"]))
    trainer.fit(task, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    before = dict(Backbone("tiny", **backbone).build().named_parameters())
    after = {key: whole(weight) for key, weight in task.model.named_parameters() if weight.requires_grad}
    return {key: weight - before[key].detach() for key, weight in after.items()}, shown


def whole(weight):
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def of_one_process(rank, port, ranks, folder):
    own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ.update({name: str(value) for name, value in (own | found).items()})
    os.chdir(folder)
    torch.set_num_threads(1)
    results = {}
    for name in CASES:
        options = {"devices": ranks, "of": range(ranks // 2)}
        results[name] = trained(name, [rank // 2], FullySharded(context=2), **options)
    shared = shared_rows(BATCH, SimpleNamespace(mesh_dim_names=["context"], get_group=group), RULE)
    with torch.no_grad():
        results["logits"] = enable(tiny_model(), RULE)(**inputs_of(BATCH, shared)).logits
    results["spans"] = shared.shares.spans(rank)
    torch.save(results, folder / f"{rank}.pt")


def group(_):
    return distributed.group.WORLD


@pytest.fixture(scope="module", params=[2, 4], ids=["one group", "two groups"])
def found(request, tmp_path_factory):
    """The folder with a teacher, and what each process has found."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_model(seed=5).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    processes.start(of_one_process, request.param, folder, count=request.param)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_devices_that_share_rows_train_what_one_does(name, found, monkeypatch):
    folder, results = found
    monkeypatch.chdir(folder)
    expected, shown = trained(name, range(len(results) // 2))
    assert sum(change.norm() for change in expected.values()) > 0
    for rank, result in enumerate(results):
        changes, losses = result[name]
        assert changes.keys() == expected.keys()
        for key, change in expected.items():
            assert (changes[key] - change).norm() <= 1e-4 * change.norm() + 1e-7, (rank, key)
        if len(results) == 2:
            assert losses == pytest.approx(shown, rel=1e-4)


def test_logits_are_those_of_one_device(found):
    _, results = found
    with torch.no_grad():
        whole = enable(tiny_model(), RULE)(**inputs_of(BATCH, None)).logits
        dense = enable(tiny_model(), RULE.replace(top_k=RULE.lag_size))(**inputs_of(BATCH, None)).logits
    assert (whole - dense).abs().max() > 1e-2
    for result in results:
        expected = torch.cat([whole[:, start:stop] for start, stop in result["spans"]], dim=1)
        torch.testing.assert_close(result["logits"], expected, atol=1e-4, rtol=0)
