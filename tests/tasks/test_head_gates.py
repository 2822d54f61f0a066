"""Gates of heads: their loss and gradients against a plain computation, what they learn, what they go with."""

import functools
import json

import pytest
import torch
from helpers import quiet_trainer, refused
from torch.utils.data import DataLoader
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lrsa_lit.attention import LRSAConfig, enable
from lrsa_lit.data.collate import collate, collate_packed
from lrsa_lit.models import Backbone, LoRA
from lrsa_lit.models.checkpoint import load_trained
from lrsa_lit.objectives import AnswerLoss
from lrsa_lit.systems import DuoAttention, Place
from lrsa_lit.tasks import HeadGates, LongContextQA, SampledTopK

SINK, RECENT, PENALTY = 2, 9, 0.05
RATE = 0.5
BEGIN = [[0.4, 0.9], [0.6, 0.2]]
"""Of two layers with two heads, far enough from 0 and 1 for a step."""


def gates(**changes):
    return HeadGates(**{"sink_size": SINK, "recent": RECENT, "penalty": PENALTY} | changes)


def task(begin=BEGIN, *, optimizer=None, head_gates=None, **options):
    optimizer = optimizer or functools.partial(torch.optim.SGD, lr=RATE)
    made = LongContextQA(Backbone("tiny", **options), optimizer=optimizer, head_gates=head_gates or gates())
    with torch.no_grad():
        made.head_gates.gates.copy_(torch.tensor(begin))
    return made


def example(prompt, answer):
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(3, 259, (prompt + answer,), generator=generator).tolist()
    empty = {"gold_spans": [], "answer_spans": [], "answers": ["x"], "match": "any"}
    return {"id": f"{prompt}", "input_ids": ids, "prompt_length": prompt, **empty}


EXAMPLES = [example(90, 2), example(33, 7), example(61, 4)]


def after_one_step(made, batches, **options):
    """The gates."""
    for batch in batches:
        batch["step_sizes"] = [each for other in batches for each in other["sizes"]]
    trainer = quiet_trainer(max_steps=1, accumulate_grad_batches=len(batches), gradient_clip_val=0.0, **options)
    trainer.fit(made, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    return made.head_gates.gates.detach().clone()


def plain_attention(of_heads, module, query, key, value, mask, scaling, **_):
    """Both attentions by masks, and each head's mixture."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    place = torch.arange(query.shape[2])
    past = place[:, None] - place
    causal = past >= 0
    shares = of_heads[module.layer_idx].repeat_interleave(group)[:, None, None]
    scores = query @ key.mT * scaling

    def seen(visible):
        return torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1) @ value

    output = shares * seen(causal) + (1 - shares) * seen(causal & ((place < SINK) | (past < RECENT)))
    return output.transpose(1, 2), None


def exact_norm(module, hidden):
    return module.weight * hidden / (hidden.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).sqrt()


def plain_loss(model, of_heads):
    """By a model of transformers alone, example by example."""
    squares, ones = [], torch.ones_like(of_heads)
    for each in EXAMPLES:
        ids, answers = torch.tensor([each["input_ids"]]), slice(each["prompt_length"] - 1, -1)
        found = []
        for given in (of_heads, ones):
            AttentionInterface.register("plain", functools.partial(plain_attention, given))
            found.append(model.model(ids).last_hidden_state[0, answers])
        squares.append((found[0] - found[1]).square().mean(dim=1))
    return torch.cat(squares).mean() + PENALTY * of_heads.mean()


@pytest.fixture(scope="module")
def exact():
    """The float64 loss at the first gates, and its gradient."""
    model = Backbone("tiny").build().double().requires_grad_(False)
    AttentionInterface.register("plain", plain_attention)
    model.set_attn_implementation("plain")
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            # The model's own computes in float32.
            module.forward = functools.partial(exact_norm, module)
    of_heads = torch.tensor(BEGIN, dtype=torch.float64, requires_grad=True)
    loss = plain_loss(model, of_heads)
    (gradient,) = torch.autograd.grad(loss, of_heads)
    with torch.no_grad():
        for place in ((0, 0), (1, 1)):
            step = torch.zeros_like(of_heads)
            step[place] = 1e-4
            slope = (plain_loss(model, of_heads + step) - plain_loss(model, of_heads - step)) / 2e-4
            torch.testing.assert_close(slope, gradient[place], rtol=1e-5, atol=1e-9)
    return loss.detach(), gradient


BATCHES = {
    "together": lambda: [collate(EXAMPLES, 2)],
    "accumulated": lambda: [collate(EXAMPLES[:1], 2), collate(EXAMPLES[1:], 2)],
    "packed": lambda: [collate_packed(EXAMPLES)],
    "packed and accumulated": lambda: [collate_packed(EXAMPLES[1:]), collate(EXAMPLES[:1], 2)],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    ("options", "precision", "error"),
    [({}, "32-true", 1e-4), ({"gradient_checkpointing": True}, "32-true", 1e-4), ({}, "bf16-mixed", 0.05)],
    ids=["kept", "checkpointed", "bf16"],
)
def test_a_step_is_that_of_the_plain_loss_in_float64(options, precision, error, batches, exact):
    made = task(**options)
    found = after_one_step(made, batches(), precision=precision)
    step = (torch.tensor(BEGIN) - found).double() / RATE
    _, wanted = exact
    assert (step - wanted).norm() <= error * wanted.norm()


def test_the_loss_is_squared_error_and_penalty(exact):
    made, rows = task(), collate(EXAMPLES, 2)
    made.configure_model()
    (total,) = made.summed_losses(rows, 0)
    mean = total.detach() / sum(map(made.objective.count, rows["sizes"]))
    part, shown, logged = made.head_gates.penalised(mean, mean, rows, 0, 1)
    torch.testing.assert_close(part.detach().double(), exact[0], rtol=1e-5, atol=0)
    assert (shown, logged["train/loss/hidden"]) == (part, mean)
    assert (logged["train/gates/open"], float(logged["train/gates/mean"])) == (0.5, pytest.approx(0.525))


QUESTION, SECRETS, WORDS = 4, (5, 6, 7), range(8, 16)


def retrieving():
    """A model of two layers with two heads, of which the first one of the first layer finds a secret for the question.

    It looks for any of three tokens, and says which; the others have no part in the output.
    """
    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=4, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=4, num_key_value_heads=2, rope_theta=1e12)  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    for weight in model.parameters():
        weight.zero_() if weight.ndim == 2 else weight.fill_(1.0)
    embedding, layer = torch.eye(16), model.model.layers[0].self_attn
    model.model.embed_tokens.weight.copy_(embedding)
    # The last channels, which such a theta hardly rotates.
    layer.q_proj.weight[15, QUESTION] = layer.q_proj.weight[31, QUESTION] = 5.0
    layer.k_proj.weight[15, list(SECRETS)] = 5.0
    layer.v_proj.weight[:16] = embedding
    layer.o_proj.weight[:, :16] = embedding
    return model


def asked(secret):
    """A secret among words, behind the sinks and far before the question."""
    generator = torch.Generator().manual_seed(secret)
    ids = torch.randint(WORDS.start, WORDS.stop, (40,), generator=generator).tolist()
    ids[12], ids[-1] = secret, QUESTION
    return example(40, 1) | {"id": str(secret), "input_ids": [*ids, secret]}


@pytest.mark.parametrize("begin", [0.3, 1.0])
def test_the_head_that_retrieves_is_found(begin):
    made = task(torch.full((2, 2), begin).tolist(), optimizer=functools.partial(torch.optim.Adam, lr=0.04))
    made.model = enable(retrieving(), made.train_config)
    batches = [collate([asked(secret) for secret in SECRETS], 2)] * 60
    quiet_trainer(max_steps=60).fit(made, DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))
    ((retrieves, *others), *further) = made.head_gates.table
    assert retrieves > 0.9
    assert max(others + further[0]) == 0.0
    assert made.head_gates.served(made.lrsa).system.full == ((True, True), (False, False))


def test_gates_stay_from_0_to_1():
    made = task([[0.0, 0.0], [1.0, 1.0]], head_gates=gates(penalty=5.0))
    assert after_one_step(made, [collate(EXAMPLES, 2)])[0].tolist() == [0.0, 0.0]
    made = task([[1.0, 1.0], [1.0, 1.0]], head_gates=gates(penalty=0.0))
    assert after_one_step(made, [collate(EXAMPLES, 2)]).max() == 1.0


def test_weights_are_frozen_and_a_checkpoint_holds_gates_alone(tmp_path):
    made, other = task(), LongContextQA(Backbone("tiny"))
    for each in (made, other):
        each.configure_model()
    assert [name for name, weight in made.named_parameters() if weight.requires_grad] == ["head_gates.gates"]
    of_gates, of_weights = {"state_dict": made.state_dict()}, {"state_dict": other.state_dict()}
    made.on_save_checkpoint(of_gates)
    assert list(of_gates["state_dict"]) == ["head_gates.gates"]
    assert of_gates["lrsa_lit"]["rule"] is None
    for task_, checkpoint, reason in (
        (made, of_weights, "it holds all weights, which do not fit this configuration, which trains gates of"),
        (other, of_gates, "it holds gates of heads, which do not fit this configuration, which trains all weights"),
    ):
        with refused("ckpt_path", reason=reason):
            task_.on_load_checkpoint(checkpoint)
    torch.save(of_gates, tmp_path / "gates.ckpt")
    with refused("model", reason="holds gates of heads and no weights"):
        load_trained(tmp_path / "gates.ckpt")


def test_evaluations_take_the_gates_as_they_are():
    made = task(head_gates=gates(served={"sparsity": 0.75, "recent": 5}))
    made.on_predict_epoch_start()
    assert made.attentions[""] is made.lrsa
    assert made.lrsa.system == DuoAttention(made.head_gates.table, 0.75, recent=5)
    assert made.lrsa.system.full == ((False, True), (False, False))
    with torch.no_grad():
        made.head_gates.gates[1, 0] = 1.0
    made.on_predict_epoch_start()
    assert made.lrsa.system.full == ((False, False), (True, False))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"objective": AnswerLoss()}, "objective"),
        ({"train_attention": {"top_k": 3}}, "train_attention"),
        ({"train_top_k": SampledTopK([4, 8])}, "train_top_k"),
        ({"backbone": Backbone("tiny", lora=LoRA(rank=2))}, "backbone.lora"),
        ({"lrsa": LRSAConfig(dense_layers=(0,))}, "lrsa.dense_layers"),
        ({"lrsa": LRSAConfig(head_top_k=[3, 4])}, "lrsa.head_top_k"),
        ({"lrsa": LRSAConfig(system=DuoAttention([[0.5]]))}, "lrsa.system"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_would_be_trained_or_evaluated_is_refused(options, field):
    with refused(field, reason="with head_gates"):
        LongContextQA(**{"backbone": Backbone("tiny"), "head_gates": gates()} | options)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"sink_size": -1}, "sink_size"), ({"recent": 0}, "recent"), ({"penalty": -0.1}, "penalty"),
     ({"served": {"gates": [[1]]}}, "served")],
)  # fmt: skip
def test_sizes_out_of_bounds_are_refused(changes, field):
    with refused(field):
        gates(**changes)


def test_a_size_of_what_is_evaluated_is_named_whole():
    with refused("head_gates.init_args.served.recent", 0):
        task(head_gates=gates(served={"recent": 0}))


def test_texts_that_hide_nothing_are_refused():
    made = task()
    made.check_objective(12, 1)
    with refused("head_gates.init_args.recent", 9, reason="cover all of 11 tokens"):
        made.check_objective(11, 1)


def test_what_trains_gates_holds_no_past():
    system = task().train_config.system
    with refused("system", reason="has no cache"):
        system.stream(Place(0), "auto")
    assert system.attended_pairs(20) == 210 + 66 + 9 * 11
    assert LRSAConfig.from_dict(json.loads(json.dumps(LRSAConfig(system=system).to_dict()))).system.recent == RECENT
