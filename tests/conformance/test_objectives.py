"""An objective weighs each of its positions the same, whatever stands beside it and however a step is cut."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_helpers import DEBUG, NO_LOGGER
from cli_helpers import elsewhere as elsewhere
from hypothesis import given
from hypothesis import strategies as st
from objective_helpers import BATCHES, EXAMPLES, RULE, SEED, STEP, assert_alike, fit, losses, padded

from lrsa_lit.attention import enable
from lrsa_lit.cli.main import main
from lrsa_lit.data.collate import ExampleSize, collate_packed
from lrsa_lit.models.backbone import LoRA
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.models.tiny import tiny_model
from lrsa_lit.objectives import Objective, Term

HALVES = [padded(EXAMPLES[:2]), collate_packed(EXAMPLES[2:])]
CUTS = {
    "4x1": [padded([one]) for one in EXAMPLES],
    "2x2 padded": [padded(EXAMPLES[:2]), padded(EXAMPLES[2:])],
    "2x2 packed": [collate_packed(EXAMPLES[:2]), collate_packed(EXAMPLES[2:])],
    "unequal": [collate_packed(EXAMPLES[2:3]), padded([EXAMPLES[0], EXAMPLES[1], EXAMPLES[3]])],
}


@pytest.fixture(scope="module")
def model():
    return enable(tiny_model().double(), RULE)


@pytest.fixture(scope="module")
def together(objective):
    """What a step of all examples in one padded batch changes."""
    return fit([padded(EXAMPLES)], objective)[0]


def test_its_terms_have_names_of_their_own(objective):
    assert isinstance(objective, Objective)
    names = [term.name for term in objective.terms]
    assert names
    assert len(set(names)) == len(names)


@given(answer=st.integers(0, 300), prompt=st.integers(0, 300))
def test_a_term_counts_no_more_positions_than_predict_a_token(objective, answer, prompt):
    size = ExampleSize.of(max(prompt + answer, 1), prompt)
    assert all(0 <= term.count(size) <= size.tokens - 1 for term in objective.terms)
    assert all(0 <= term.logits(size) <= size.tokens - 1 for term in objective.terms)


def test_a_loss_is_the_same_packed_padded_and_alone(model, objective):
    alone = sum(losses(model, objective, padded([one])) for one in EXAMPLES)
    assert alone.isfinite().all()
    for collated in BATCHES.values():
        for examples in (EXAMPLES, EXAMPLES[::-1]):
            torch.testing.assert_close(losses(model, objective, collated(examples)), alone, rtol=1e-9, atol=1e-12)


def test_what_is_drawn_depends_on_seed_step_and_example_alone(model, objective):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = losses(model, objective, padded(EXAMPLES))
    assert torch.equal(torch.get_rng_state(), before), "a run's dropout does not depend on its objective"
    torch.manual_seed(1)
    assert torch.equal(losses(model, objective, padded(EXAMPLES)), first)
    renamed = [{**one, "id": f"{one['id']} again"} for one in EXAMPLES]
    others = [losses(model, objective, padded(EXAMPLES), seed=SEED + 1), losses(model, objective, padded(renamed)),
              losses(model, objective, padded(EXAMPLES), step=STEP + 1)]  # fmt: skip
    changed = [[not torch.equal(one, two) for one, two in zip(first, other, strict=True)] for other in others]
    assert changed[0] == changed[1] == changed[2], "by all three, or by none where nothing is drawn"


class Watched(Term):
    """A term that keeps what it has seen."""

    def __init__(self, term):
        super().__init__()
        self.term, self.name, self.teacher = term, term.name, term.teacher
        self.count, self.layers = term.count, term.layers

    def count(self, size): ...

    def loss(self, seen):
        self.seen = seen
        return self.term.loss(seen)


def inputs_of(model, objective, batch):
    """Each term as a function of what gets a gradient from it: hidden states, the head's weights, layers' outputs."""
    watched = [Watched(term) for term in objective.terms]
    losses(model, SimpleNamespace(terms=watched), batch)
    for term, seen in ((each.term, each.seen) for each in watched):
        # A teacher that is the model itself takes no gradient, so it is held still.
        taught = {teacher: dataclasses.replace(of, head=of.head or seen.head) for teacher, of in seen.taught.items()}

        def loss(hidden, weight, *layers, term=term, seen=seen, taught=taught):
            head, of_layers = copy.copy(seen.head), dict(zip(seen.layers, layers, strict=True))
            head.weight = weight
            return term.loss(dataclasses.replace(seen, hidden=hidden, head=head, layers=of_layers, taught=taught))

        inputs = seen.hidden, seen.head.weight, *seen.layers.values()
        yield term, loss, [each.detach().clone().requires_grad_() for each in inputs]


def gradients_of(loss, inputs):
    found = torch.autograd.grad(loss(*inputs), inputs, allow_unused=True)
    return [torch.zeros_like(of) if each is None else each for each, of in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("collated", BATCHES.values(), ids=BATCHES)
def test_only_positions_that_count_get_a_gradient(model, objective, collated):
    batch = collated(EXAMPLES)
    width = batch["input_ids"].shape[1]
    starts = batch["boundaries"] or range(0, len(EXAMPLES) * width, width)
    for term, loss, inputs in inputs_of(model, objective, batch):
        by_hidden, _, *by_layers = gradients_of(loss, inputs)
        rows = torch.stack([(each != 0).any(dim=1) for each in (by_hidden, *by_layers)]).any(dim=0)
        for start, size, (first, end) in zip(starts, batch["sizes"], batch["rejected"], strict=False):
            predicting, of_rejected = slice(start, start + size.tokens - 1), slice(first - 1, end - 1)
            assert rows[predicting].sum() + rows[of_rejected].sum() <= term.logits(size)
            rows[predicting] = rows[of_rejected] = False
        assert not rows.any(), "padding and the last token of an example predict nothing"


@torch.no_grad()
def test_gradients_are_those_of_finite_differences(model, objective):
    generator, step = torch.Generator().manual_seed(0), 1e-6
    for _, loss, inputs in inputs_of(model, objective, collate_packed(EXAMPLES)):
        with torch.enable_grad():
            gradients = gradients_of(loss, inputs)
        for _ in range(3):
            ways = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in inputs]
            up, down = (loss(*(each + sign * way for each, way in zip(inputs, ways, strict=True)))
                        for sign in (step, -step))  # fmt: skip
            expected = sum((one * other).sum() for one, other in zip(gradients, ways, strict=True))
            torch.testing.assert_close((up - down) / (2 * step), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batches", CUTS.values(), ids=CUTS)
def test_each_position_weighs_the_same_however_a_step_is_cut(objective, together, batches):
    assert_alike(fit(batches, objective)[0], together)


def test_recomputed_layers_do_the_same(objective, together):
    assert_alike(fit(HALVES, objective, gradient_checkpointing=True)[0], together)


def test_adapters_learn_the_same_however_a_step_is_cut(objective):
    lora = LoRA(rank=2)
    assert_alike(fit(HALVES, objective, lora=lora)[0], fit([padded(EXAMPLES)], objective, lora=lora)[0])


@pytest.fixture
def longer(objective):
    """For a test that takes seconds: the shipped terms are tested together, as those of Sum."""
    if len(objective.terms) == 1 and type(objective).__module__.startswith("lrsa_lit."):
        pytest.skip("tested as a term of Sum")


@pytest.mark.slow
@pytest.mark.usefixtures("longer")
def test_compiled_layers_do_the_same(objective):
    torch._dynamo.reset()
    step = [collate_packed(EXAMPLES)]
    compiled, _ = fit(step, objective, compile_layers=True, gradient_checkpointing=True)
    assert_alike(compiled, fit(step, objective)[0], tolerance=2e-3)


@pytest.fixture
def settings(objective_settings, tmp_path):
    """The options of a fit with the objective from a YAML file, on data with two answers to each prompt."""
    pairs = {"class_path": "lrsa_lit.data.PreferencePairs", "init_args": {"train": "data/sample-pairs.jsonl"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(objective_settings | {"data": pairs}))
    quiet = ["--validate_first", "false", "--data.init_args.val", "null", "--model.lr_scheduler", "null"]
    return [*DEBUG, *NO_LOGGER, *quiet, "--config", "own.yaml"]


@pytest.mark.usefixtures("longer")
def test_a_resumed_fit_has_the_weights_of_one_that_was_not_stopped(settings, tmp_path):
    def weights(name, steps, *options):
        folder = tmp_path / name
        main(["fit", *settings, "--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(steps), *options])
        return folder / "checkpoints" / "last.ckpt"

    half, straight = weights("half", 1), weights("straight", 3)
    resumed = weights("rest", 3, "--ckpt_path", str(half))
    found, expected = load_trained(resumed).weights, load_trained(straight).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_its_settings_are_recorded_as_they_can_be_given_again(settings, objective_settings, tmp_path, capfd):
    def printed(*given):
        with pytest.raises(SystemExit):
            main(["fit", *given, "--print_config"])
        return capfd.readouterr().out

    once = printed(*settings)
    (tmp_path / "printed.yaml").write_text(once)
    assert printed("--config", "printed.yaml") == once
    given, recorded = objective_settings["model"]["objective"], yaml.safe_load(once)["model"]["objective"]
    assert recorded["class_path"] == given["class_path"]
    assert given["init_args"].items() <= recorded.get("init_args", {}).items() or "objectives" in given["init_args"]
