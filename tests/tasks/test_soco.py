"""Learned spectra: phases, the step they take against a plain float64 computation, what they go with."""

import functools
import json
from pathlib import Path

import pytest
import torch
from helpers import quiet_trainer, refused
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lrsa_lit.data.collate import collate, collate_packed
from lrsa_lit.models import Backbone, LoRA, LowRank
from lrsa_lit.models.checkpoint import load_trained, spectra_in
from lrsa_lit.models.spectrum import spectra_of
from lrsa_lit.objectives import Distillation
from lrsa_lit.tasks import HeadGates, LongContextQA, SoCo

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/systems/soco.json").read_text(encoding="utf-8"))
RATE, STEPS = 0.3, 100
RATIO = 0.4
CONSTANTS = {"threshold": 0.05, "temperature": 0.1, "ratio_weight": 1.0, "decision_weight": 0.1}
"""Under which the losses are recorded."""


def example(prompt, answer):
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(3, 259, (prompt + answer,), generator=generator).tolist()
    empty = {"gold_spans": [], "answer_spans": [], "answers": ["x"], "match": "any"}
    return {"id": f"{prompt}", "input_ids": ids, "prompt_length": prompt, **empty}


EXAMPLES = [example(50, 2), example(13, 7), example(31, 4)]


def begun(number, shape, scale):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64) * scale


def task(spectra=None, *, begin=True, **options):
    """One whose spectra were trained before, so that no loss or gradient is zero."""
    optimizer = functools.partial(torch.optim.SGD, lr=RATE)
    objective = Distillation(adapters=False, positions=255)
    made = LongContextQA(Backbone("tiny", **options), optimizer=optimizer, train_attention=None, objective=objective,
                         spectra=spectra or SoCo(RATIO))  # fmt: skip
    made.configure_model()
    with torch.no_grad():
        for number, layer in enumerate(spectra_of(made.model).values() if begin else ()):
            layer.logits.copy_(begun(number, layer.logits.shape, 2.0))
            layer.deviation.copy_(begun(number + 100, layer.deviation.shape, 0.1))
    return made


def fit(made, batches, step=0, **options):
    """Train on some batches, which are one step; it counts from ``step``."""
    for batch in batches:
        batch["step_sizes"] = [each for other in batches for each in other["sizes"]]
    trainer = quiet_trainer(max_steps=STEPS, limit_train_batches=len(batches), max_epochs=1,
                            accumulate_grad_batches=len(batches), gradient_clip_val=0.0, **options)  # fmt: skip
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    trainer.fit(made, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    return made


def parts(made):
    return [
        part.detach().clone() for layer in spectra_of(made.model).values() for part in (layer.logits, layer.deviation)
    ]


def test_losses_of_the_phases_are_the_recorded_ones():
    of, kl = VECTORS["stage_loss"], VECTORS["kl"]["mean_kl"]
    counts = {name: VECTORS[name] for name in ("threshold", "temperature")}
    made = SoCo(VECTORS["target_ratio"], **counts, ratio_weight=of["lambda_c"], decision_weight=of["lambda_s"])
    scores = [torch.tensor([VECTORS["scores"]], dtype=torch.float64)]
    outputs, inputs = len(VECTORS["W"]), len(VECTORS["W"][0])
    # The recorded ratio is of weights: m + n of m n for each component.
    whole = outputs * inputs / (outputs + inputs)
    for step, name in (
        (0, "stage1"),
        (29, "stage1"),
        (40, "stage2_even"),
        (30, "stage2_odd"),
        (70, "stage3"),
        (99, "stage3"),
    ):
        assert kl + float(made.penalty(scores, whole, step, 100)) == pytest.approx(of[name], abs=1e-9)
    assert float(made.penalty(scores, whole, 0, 100)) == pytest.approx(VECTORS["ratio_loss_relu"], abs=1e-9)


def test_phases_are_shares_of_the_steps():
    made = SoCo(0.5, **CONSTANTS)
    assert [made.phase(step, 10) for step in range(10)] == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert [SoCo(0.5, phases=(0.5, 0.25, 0.25)).phase(step, 4) for step in range(4)] == [1, 1, 2, 3]
    low = [torch.full((1, 8), -0.5)]
    weights = [float(made.penalty(low, 16, step, 60)) for step in (0, 20, 30, 59)]
    # Below the ratio the first phases ask for nothing, the last one for more.
    assert weights[:3] == [0.0, 0.0, 0.0]
    assert weights[3] > 0.4


def plain_model():
    """Of transformers alone, in float64; the model's own norms compute in float32."""
    model = Backbone("tiny").build().double().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = functools.partial(exact_norm, module)
    return model


def exact_norm(module, hidden):
    return module.weight * hidden / (hidden.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).sqrt()


def plain_loss(model, values, step):
    """Mean divergence over all positions that predict something, and the penalty, written out.

    Args:
        model: the untouched one.
        values: logits and deviation of each projection, in turn.
        step: 0 in the first phase, 35 in the second, where nothing is added, 80 in the third.
    """
    weights, shares, at = dict(model.named_parameters()), [], iter(values)
    for number in range(2):
        for name in ("k_proj", "v_proj"):
            linear = getattr(model.model.layers[number].self_attn, name)
            logits, deviation = next(at), next(at)
            left, sigma, right = torch.linalg.svd(linear.weight, full_matrices=False)
            scores = 2 / (1 + torch.exp(-logits[0]))
            weights[f"model.layers.{number}.self_attn.{name}.weight"] = left @ torch.diag(sigma * scores) @ right
            linear.register_parameter(
                "bias", torch.nn.Parameter(torch.zeros(32, dtype=torch.float64), requires_grad=False)
            )
            weights[f"model.layers.{number}.self_attn.{name}.bias"] = deviation
            shares.append(1 / (1 + torch.exp(-(scores - 0.05) / 0.1)))
    divergences = []
    for each in EXAMPLES:
        ids = torch.tensor([each["input_ids"]])
        wanted = model(ids).logits[0, :-1].log_softmax(dim=1)
        found = functional_call(model, weights, (ids,)).logits[0, :-1].log_softmax(dim=1)
        divergences.append((wanted.exp() * (wanted - found)).sum(dim=1))
    share = torch.cat(shares)
    excess = share.sum() / 128 - RATIO
    penalty = {0: torch.relu(excess), 35: 0.0, 80: excess.abs() + 0.1 * (share * (1 - share)).mean()}[step]
    return torch.cat(divergences).mean() + penalty


@pytest.fixture(scope="module")
def exact():
    """The gradients of the plain loss in float64, by phase."""
    model = plain_model()
    values = [each.double().requires_grad_() for each in parts(task())]
    return {step: torch.autograd.grad(plain_loss(model, values, step), values) for step in (0, 35, 80)}


BATCHES = {
    "together": lambda: [collate(EXAMPLES, 2)],
    "accumulated": lambda: [collate(EXAMPLES[:1], 2), collate(EXAMPLES[1:], 2)],
    "packed and accumulated": lambda: [collate_packed(EXAMPLES[1:]), collate(EXAMPLES[:1], 2)],
}


@pytest.mark.parametrize(
    ("batches", "options", "step"),
    [
        ("together", {}, 0),
        ("together", {}, 35),
        ("together", {}, 80),
        ("accumulated", {}, 80),
        ("packed and accumulated", {}, 0),
        ("together", {"gradient_checkpointing": True}, 80),
    ],
)
def test_a_step_is_that_of_the_plain_loss_in_float64(batches, options, step, exact):
    made = task(SoCo(RATIO, deviation_rate=1.0, **CONSTANTS), **options)
    before = parts(made)
    after = parts(fit(made, BATCHES[batches](), step))
    for old, new, wanted in zip(before, after, exact[step], strict=True):
        assert ((old - new).double() / RATE - wanted).norm() <= 1e-3 * wanted.norm()


def test_the_first_step_knows_of_no_divergence():
    """The teacher computes the very same."""
    made = task(begin=False)
    (total,) = made.summed_losses(collate(EXAMPLES, 2), 0)
    assert total.item() == 0.0


def test_only_scores_and_deviations_are_trained_the_latter_slower():
    made = task(SoCo(RATIO, dense_layers=(0,)))
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    fit(made, [collate(EXAMPLES, 2)])
    names = {name for name, weight in made.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert names == {f"model.layers.1.self_attn.{one}_proj.{part}" for one in "kv" for part in ("logits", "deviation")}
    optimizer = made.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [RATE, 0.01 * RATE]
    assert [[each.ndim for each in group["params"]] for group in optimizer.param_groups] == [[2, 2], [1, 1]]


def test_a_schedule_keeps_the_two_rates_apart():
    made = task()
    made.make_scheduler = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10)
    found = made.configure_optimizers()["optimizer"]
    assert [group["lr"] for group in found.param_groups] == [RATE, 0.01 * RATE]
    made.make_scheduler = functools.partial(
        torch.optim.lr_scheduler.OneCycleLR, max_lr=RATE, total_steps=10, cycle_momentum=False
    )
    with refused("lr_scheduler", "OneCycleLR", allowed="scales the rates of all groups alike"):
        made.check_optimizer()


@torch.no_grad()
def test_evaluations_use_what_is_kept_and_training_all():
    made = task()
    rows = collate(EXAMPLES, 2)
    made.model.eval()

    def logits():
        return made.model(rows["input_ids"], use_cache=False).logits

    before = logits()
    made.on_predict_epoch_start()
    cut = logits()
    kept = [layer.kept for layer in spectra_of(made.model).values()]
    assert sum(int(each.sum()) for each in kept) == int(RATIO * 128 + 0.5)
    made.on_predict_epoch_end()
    assert torch.equal(logits(), before)
    assert (cut - before).norm() > 0.05 * before.norm()


def saved(made, path, steps=STEPS):
    made._trainer = quiet_trainer(max_steps=steps)
    checkpoint = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return checkpoint


@pytest.mark.parametrize("grouping", ["joint", "head"])
def test_a_checkpoint_becomes_the_model_that_was_evaluated(tmp_path, grouping):
    made = task(SoCo(RATIO, grouping=grouping, threshold=0.3), dtype="float32")
    saved(made, tmp_path / "spectra.ckpt")
    made.on_predict_epoch_start()
    trained = load_trained(tmp_path / "spectra.ckpt")
    assert trained.backbone.low_rank == LowRank(RATIO, grouping=grouping)
    rows = collate(EXAMPLES, 2)["input_ids"]
    found, wanted = (each.eval()(rows, use_cache=False).logits for each in (trained.build(), made.model))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_damaged_spectra_are_refused(tmp_path):
    made = task()
    whole = saved(made, tmp_path / "spectra.ckpt")
    name = "model.model.layers.0.self_attn.k_proj"
    changes = {
        "lacks": lambda held: held["state_dict"].pop(f"{name}.sigma"),
        "shape": lambda held: held["state_dict"].update({f"{name}.left": torch.ones(1, 3, 3)}),
        "ratio": lambda held: held["lrsa_lit"]["spectra"].update(ratio=2.0),
        "kind": lambda held: held["lrsa_lit"]["spectra"].update(threshold="x"),
        "less": lambda held: held["lrsa_lit"]["spectra"].pop("ratio"),
    }
    for change in changes.values():
        damaged = {"state_dict": dict(whole["state_dict"]),
                   "lrsa_lit": {**whole["lrsa_lit"], "spectra": dict(spectra_in(whole))}}  # fmt: skip
        change(damaged)
        torch.save(damaged, tmp_path / "damaged.ckpt")
        with refused("model", reason="is not a checkpoint written by a fit, or is truncated or damaged"):
            load_trained(tmp_path / "damaged.ckpt")


def test_a_run_of_another_length_does_not_go_on(tmp_path):
    made = task()
    checkpoint = saved(made, tmp_path / "spectra.ckpt")
    made._trainer = quiet_trainer(max_steps=STEPS + 1)
    made._trainer.training = True
    with refused("ckpt_path", reason="its sequence of phases is 100 steps long and cannot be changed to max_steps=101"):
        made.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"threshold": 1.0}, "threshold"),
        ({"phases": (0.5, 0.5)}, "phases"),
        ({"phases": (0.5, 0.5, 0.5)}, "phases"),
        ({"phases": (0.5, 0.6, -0.1)}, "phases"),
        ({"ratio_weight": -1.0}, "ratio_weight"),
        ({"decision_weight": float("inf")}, "decision_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"deviation_rate": -0.1}, "deviation_rate"),
    ],
)
def test_settings_out_of_bounds_are_refused(arguments, field):
    with refused(field):
        SoCo(**{"ratio": 0.5} | arguments)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"backbone": Backbone("tiny", lora=LoRA(rank=2))}, "backbone.lora"),
        ({"backbone": Backbone("tiny", low_rank=LowRank(0.5))}, "backbone.low_rank"),
        ({"head_gates": HeadGates()}, "head_gates"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_would_be_trained_is_refused(options, field):
    with refused(field, reason="with spectra"):
        LongContextQA(**{"backbone": Backbone("tiny"), "spectra": SoCo(0.5)} | options)


def test_a_teacher_that_is_the_same_is_refused():
    options = {"train_attention": None, "spectra": SoCo(0.5)}
    with refused("objective", reason="cannot learn from itself"):
        LongContextQA(Backbone("tiny"), objective=Distillation(), **options)
    LongContextQA(Backbone("tiny"), objective=Distillation(adapters=False), **options)
    with refused("objective", reason="cannot learn from itself"):
        LongContextQA(Backbone("tiny"), objective=Distillation(adapters=False), train_attention=None)


def test_steps_and_models_that_leave_nothing_are_refused():
    made = task()
    made.check_objective(256, 4)
    for steps in (-1, 0, 2):
        with refused("spectra.init_args.phases", reason="leaves a phase without a step"):
            made.check_objective(256, steps)
    with refused("spectra.init_args.ratio", 0.01):
        LongContextQA(Backbone("tiny"), spectra=SoCo(0.01)).check_objective(256, 100)
