"""What a fit will take, from a few of its layers."""

import functools
import os
import signal

import pytest
import torch
from cli_helpers import DEBUG, WHOLE, interruptible, refusal
from helpers import refused

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli import estimate as few
from lrsa_lit.cli.estimate import Layers, extrapolate
from lrsa_lit.cli.main import main
from lrsa_lit.cli.step_cost import Batches, Cost, measure
from lrsa_lit.data.collate import collate
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.tiny import tiny_config
from lrsa_lit.systems import DuoAttention
from lrsa_lit.tasks import LongContextQA

CPU = {"accelerator": "cpu", "gradient_clip_val": 1.0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRSA_CACHE_DIR", str(tmp_path / "cache"))


def batches(tokens=160):
    example = {
        "id": "",
        "input_ids": [5] * tokens,
        "prompt_length": tokens - 8,
        "gold_spans": [],
        "answer_spans": [],
        "answers": [""],
        "match": "any",
    }
    batch = collate([example], pad_token_id=0)
    return Batches(batch, [batch])


def task(folder, dense_layers=(), layers=7, **options):
    tiny_config(num_layers=layers).save_pretrained(folder)
    rule = LRSAConfig(sink_size=4, lag_size=16, top_k=4, dense_layers=dense_layers)
    backbone = Backbone(str(folder), random_weights=True, **options)
    return LongContextQA(backbone, rule, functools.partial(torch.optim.AdamW, lr=1e-4))


@pytest.mark.parametrize(
    ("options", "dense_layers"),
    [({}, ()), ({"gradient_checkpointing": True}, ()), ({"lora": LoRA(rank=4)}, (1, 4, 5))],
    ids=["full", "recomputed", "lora and dense layers"],
)
def test_parameters_and_memory_are_those_of_all_layers(options, dense_layers, tmp_path):
    made = task(tmp_path / "shape", dense_layers, **options)
    whole = few._layers(made)
    assert whole == (len(dense_layers), 7 - len(dense_layers))
    measured = few._measure_few(whole, lambda layers: measure(few._shortened(made, layers), batches(), CPU))
    assert whole not in measured
    assert all(sum(layers) <= 4 for layers in measured)
    found = extrapolate(whole, measured)
    model = made.backbone.build()
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert found.weights == 4 * found.parameters
    # Two moments for each weight, and the number of steps.
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=0.01)
    together = measure(few._shortened(made, whole), batches(), CPU)
    assert found.peak_passes == pytest.approx(together.peak_passes, rel=0.02)
    assert found.peak_step == pytest.approx(together.peak_step, rel=0.02)
    assert found.peak > found.weights + found.gradients + found.optimizer
    assert made.model is None


def test_recomputing_saves_memory_and_longer_texts_cost_it(tmp_path):
    kept, recomputed = (
        measure(task(tmp_path / "shape", layers=4, gradient_checkpointing=on), batches(), CPU).peak
        for on in (False, True)
    )
    longer = measure(task(tmp_path / "shape", layers=4), batches(320), CPU).peak
    assert recomputed < kept < longer


def cost(dense, sparse):
    """Every field another line through both numbers of layers."""
    return Cost(*(10.0 * field + (2 + field) * dense + (1 + 3 * field) * sparse for field in range(len(Cost._fields))))


@pytest.mark.parametrize("whole", [Layers(0, 16), Layers(3, 29), Layers(12, 0), Layers(5, 1), Layers(1, 2)])
def test_extrapolation_is_a_line_in_each_kind_of_layer(whole):
    measured = {layers: cost(*layers) for layers in few._to_measure(whole, 2, 4)}
    assert extrapolate(whole, measured) == pytest.approx(cost(*whole))


def test_fewer_layers_are_measured_where_four_do_not_fit():
    tried = []

    def measure(layers):
        tried.append(sum(layers))
        if sum(layers) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return cost(*layers)

    most = 2
    assert list(few._measure_few(Layers(0, 16), measure)) == [(0, 1), (0, 2)]
    assert tried == [2, 4, 1, 2]
    most = 0
    with refused("--estimate", reason="data.init_args.batch_size"):
        few._measure_few(Layers(0, 16), measure)


def test_the_command_says_what_a_fit_takes_and_leaves_no_trace(tmp_path, capfd, caplog):
    main(["fit", *DEBUG, "--estimate", "--data.init_args.max_tokens", "400"])
    shown = " ".join(capfd.readouterr().out.split())
    assert "Measuring a model of 2 layers (1 of 1)" in caplog.messages
    assert "parameters │ 107,200" in shown
    for part in ("trained", "optimizer", "peak", "free on cpu", "fits", "seconds a step", "hours for all steps"):
        assert part in shown
    assert "not tokenised yet, so each example has 400 tokens" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_it_with_the_exit_code_of_a_stop(number, code, monkeypatch, capfd):
    step = LongContextQA.training_step

    def interrupted(self, batch, batch_idx):
        os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LongContextQA, "training_step", interrupted)
    with interruptible(), pytest.raises(SystemExit) as stop:
        main(["fit", *DEBUG, "--estimate"])
    assert stop.value.code == code
    assert "Estimate" not in capfd.readouterr().out


def test_lengths_of_data_that_is_tokenised(tmp_path, capfd):
    from lrsa_lit.data import QAFiles
    from lrsa_lit.models.tiny import tiny_tokenizer

    data = QAFiles(
        tokenizer=tiny_tokenizer(), max_tokens=4096, **dict.fromkeys(("train", "val", "test"), "data/sample.jsonl")
    )
    data.prepare_data("fit")
    before = sorted(tmp_path.rglob("*"))
    main(["fit", *WHOLE, "--estimate", "--trainer.accumulate_grad_batches", "3"])
    shown = " ".join(capfd.readouterr().out.split())
    assert "lengths of 8 batches" in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("test", [], ["--estimate", "test"]),
        ("fit", ["--config", "configs/trainer/fsdp.yaml"], ["--estimate", "sharded"]),
    ],
)
def test_what_is_not_estimated(command, options, named, tmp_path, capfd):
    last = refusal(capfd, command, *DEBUG, *options, "--estimate")
    assert all(part in last for part in named)
    assert list(tmp_path.iterdir()) == []


def test_gates_of_all_layers_become_those_of_a_few(tmp_path):
    made = task(tmp_path / "shape")
    gates = [[0.1 * layer, 0.1 * layer + 0.05] for layer in range(7)]
    made.train_config = LRSAConfig(system=DuoAttention(gates, sparsity=0.5, recent=16))
    for layers in (Layers(0, 2), Layers(1, 4)):
        short = few._shortened(made, layers)
        system = short.train_config.system
        assert len(system.gates) == sum(layers)
        assert set(system.gates) <= {tuple(row) for row in gates}
        assert sum(map(sum, system.full)) == sum(layers)
        assert measure(short, batches(40), CPU).pass_seconds > 0
